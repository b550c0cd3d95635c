"""What became of a test session, in a file for whoever started it: `scripts/ci_tests.py` asks for it.

`RORQUAL_TEST_REPORT` names the file; sessions that tests start themselves do not inherit it.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "RORQUAL_TEST_REPORT"


class SessionReport:
    """passed, failed: node ids; broken: what is no failure of a test, but of collection or of a whole process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: list[str] = []
        self.failed: list[str] = []
        self.broken: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"collecting {report.nodeid}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in ("setup", "call", "teardown"):  # as xdist says that a worker died
            self.broken.append(f"the process of {report.nodeid}")
        elif report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        told: dict[str, Any] = {
            "exit": int(exitstatus), "passed": self.passed, "failed": self.failed, "broken": self.broken,
        }  # fmt: skip
        self.path.write_text(json.dumps(told))


def report_if_asked(config: pytest.Config) -> None:
    """For a conftest's `pytest_configure`."""
    if not hasattr(config, "workerinput") and (path := os.environ.pop(VARIABLE, None)):
        config.pluginmanager.register(SessionReport(Path(path)))
