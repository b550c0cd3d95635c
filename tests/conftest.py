"""Makes the modules in `tests/support` importable from every test folder, and has what several folders ask for."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.accelerator.is_available():  # before anything imports triton, whose own functions are made at its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["RORQUAL_HOME"] = tempfile.mkdtemp(prefix="rorqual-home-")  # no test touches the user's own ledger
atexit.register(shutil.rmtree, os.environ["RORQUAL_HOME"], ignore_errors=True)

sys.path.insert(0, str(Path(__file__).parent / "support"))

# how fast examples are drawn says something of the machine, and nothing of what is tested
hypothesis.settings.register_profile("rorqual", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("rorqual")


def pytest_configure(config: pytest.Config) -> None:
    from session_report import report_if_asked

    report_if_asked(config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported to collect the tests stays: nobody needs to look through it at each collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for a test: more only cost time on tiny matrices, and sums may end in another last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
