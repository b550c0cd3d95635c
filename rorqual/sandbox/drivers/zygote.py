"""Function sandboxes: a jail of bubblewrap with a warm Python interpreter in it that is forked for each small call.

Isolates as the bwrap driver does, and each lease has a jail of its own: nothing of one trajectory is left for the next,
because a released worker is destroyed with its jail. What makes it quick is a pool that keeps jails with interpreters
ready. Does not isolate: the kernel is the host's; calls of one lease share files.
"""

from __future__ import annotations

import shutil
from typing import ClassVar

from rorqual.sandbox.drivers.bwrap import Bwrap
from rorqual.sandbox.spec import Kind


class Zygote(Bwrap):
    """Functions: the same jail, with an interpreter that the SDK keeps warm (functions.py)."""

    kind: ClassVar[Kind] = "function"
    name: ClassVar[str] = "zygote"

    def missing(self) -> str | None:
        """What plainly lacks here: what bwrap needs, and a Python below /usr."""
        missing = super().missing()
        if missing is None and shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") is None:
            return "there is no python3 in /usr/bin; an administrator can `apt install python3`"
        return missing
