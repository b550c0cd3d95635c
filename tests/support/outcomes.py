"""A pytest plugin (`-p outcomes`) that writes what became of each test to the file $RORQUAL_OUTCOMES, a line a phase.

For `scripts/mutate.py`, which must tell a test that failed from one that never ran, and say how it failed.
"""

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the phase (setup, call or teardown), how it ended, and the first words of a failure."""
    said = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = (crash.message if crash is not None else str(report.longrepr)).split("\n")[0][:200]
    line = {"test": report.nodeid, "phase": report.when, "outcome": report.outcome, "said": said}
    with open(os.environ["RORQUAL_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
