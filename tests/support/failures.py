"""Whether a test failed, known to the fixtures that end after it."""

import pytest

FAILED = pytest.StashKey[bool]()


def note_failure(item: pytest.Item, report: pytest.TestReport) -> None:
    """For a conftest's `pytest_runtest_makereport`."""
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed


def has_failed(request: pytest.FixtureRequest) -> bool:
    """Whether the test that a fixture serves failed so far."""
    return bool(request.node.stash.get(FAILED, False))
