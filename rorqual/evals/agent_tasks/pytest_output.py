"""What pytest's summary (`-rA`) says of each test."""

from __future__ import annotations

import re

_LINE = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) ([^\[\n]+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
_HEADING = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_COUNT = r"\d+ [a-z]+(?: [a-z]+)?"
_LAST = re.compile(
    rf"^(?:=+ )?(?:no tests ran|{_COUNT}(?:, {_COUNT})*) in [0-9.]+s(?: \([^)]*\))?(?: =+)?$", re.MULTILINE
)
_UNCOLLECTED = re.compile(r"^!+ .*(?:errors? during collection|Interrupted).* !+$", re.MULTILINE)


def outcomes(text: str) -> dict[str, str]:
    """State by test id, the last word on each; `SKIPPED` lines name files, not tests, and are left out.

    Only lines behind the summary's heading count, where there is one: what tests print comes before it, and a test may
    print `PASSED x`. Where there is none, pytest may not have run at all (`was_collected`).
    """
    headings = list(_HEADING.finditer(text))
    summary = text[headings[-1].end() :] if headings else text
    return {match[2]: match[1] for match in _LINE.finditer(summary) if match[1] != "SKIPPED"}


def was_collected(text: str) -> bool:
    """Whether pytest found its tests and ran to the end: not where a file could not be imported, or it was ended."""
    return not broke_off(text) and _LAST.search(text) is not None


def broke_off(text: str) -> bool:
    """Whether it says that it ended because a file could not be imported."""
    return _UNCOLLECTED.search(text) is not None
