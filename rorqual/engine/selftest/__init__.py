"""Does the exactness that is promised hold on this machine? Run by `rorqual selftest`."""

from rorqual.engine.selftest.engines import control
from rorqual.engine.selftest.history import compare, default_path, identity
from rorqual.engine.selftest.report import Check, Progress, SubjectReport
from rorqual.engine.selftest.run import examine_model
from rorqual.engine.selftest.subject import high_entropy, small_config, small_network

__all__ = [
    "Check",
    "Progress",
    "SubjectReport",
    "compare",
    "control",
    "default_path",
    "examine_model",
    "high_entropy",
    "identity",
    "small_config",
    "small_network",
]
