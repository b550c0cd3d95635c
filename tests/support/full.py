"""How much the long tests do: enough for every change, or with `RORQUAL_TEST_FULL=1` as much as was once shown."""

import os


def often(each_change: int, in_full: int) -> int:
    """How often to do what a test repeats."""
    return in_full if os.environ.get("RORQUAL_TEST_FULL", "0") != "0" else each_change
