"""What pytest's summary (`-rA`) says of each test."""

from __future__ import annotations

import re

_LINE = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) ([^\[\n]+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)


def outcomes(text: str) -> dict[str, str]:
    """State by test id, the last word on each; `SKIPPED` lines name files, not tests, and are left out."""
    return {match[2]: match[1] for match in _LINE.finditer(text) if match[1] != "SKIPPED"}
