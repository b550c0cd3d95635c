"""Makes the helpers of this folder importable and keeps tiny matrices on one thread."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def keep_to_one_thread(one_thread: None) -> None:
    """`one_thread` for every test of this folder."""
