"""Run a test target of the Makefile; a few end-to-end tests that failed beside others are run once more, alone.

    .venv/bin/python scripts/ci_tests.py test-slow NOTES

A test that passes only alone is written to the file NOTES, which `.ci/run` prints at its very end: it is a fault of the
test or a race in the code, and somebody must look. Nothing is run again when more than MOST tests failed, when one of
them lies outside of tests/e2e, when collecting failed, or when a process died: then the target's failure stands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MOST = 5
PLACE = "tests/e2e/"
TESTS_FAILED = 1  # pytest's exit code when all ran and some failed


def why_not_again(report: dict[str, Any] | None) -> str | None:
    """Why what failed is not run again; None where it may be."""
    if report is None:
        return "the tests said nothing about how they ended"
    if report["broken"]:
        return f"this is not a failure of one test: {', '.join(report['broken'])}"
    if report["exit"] != TESTS_FAILED or not report["failed"]:
        return f"pytest ended with {report['exit']}"
    if len(report["failed"]) > MOST:
        return f"{len(report['failed'])} tests failed, and {MOST} at most are run again"
    elsewhere = [name for name in report["failed"] if not name.startswith(PLACE)]
    return f"only tests below {PLACE} are run again, and not {', '.join(elsewhere)}" if elsewhere else None


def run(command: list[str]) -> tuple[int, dict[str, Any] | None]:
    """Run it: its exit code, and what the test session in it reported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report"
        code = subprocess.run(command, env={**os.environ, "RORQUAL_TEST_REPORT": str(path)}, check=False).returncode
        return code, json.loads(path.read_text()) if path.exists() else None


def main(target: str, notes: Path) -> int:
    """The exit code: 0 when all passed, be it at the second try."""
    code, report = run(["make", target])
    if code == 0:
        return 0
    reason = why_not_again(report)
    if reason is not None or report is None:
        print(f"\nmake {target} failed and nothing is run again: {reason}.", flush=True)
        return code
    names = report["failed"]
    print(f"\nmake {target} failed. Once more, alone:", *names, sep="\n  ", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    code, again = run([sys.executable, "-m", "pytest", "-n", "0", *names])
    if code != 0 or again is None or not set(names) <= set(again["passed"]):
        print(f"\nmake {target} failed, and so did the second try.", flush=True)
        return code or 1
    with open(notes, "a") as file:
        file.writelines(f"passed only when run again alone: {name}: look at it\n" for name in names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
