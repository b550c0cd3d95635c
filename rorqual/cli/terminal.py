"""Text of a model on its way to a terminal."""

import re
import sys

# Everything below the space but tab and newline, DEL, and the C1 block, which some terminals obey too.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with control characters as U+FFFD where stdout is a terminal, which would obey them; else as it is."""
    return _CONTROLS.sub("\ufffd", text) if sys.stdout.isatty() else text
