"""DSec in Python: four kinds of sandbox behind one SDK (V4 report, section 5.2.5).

    with rorqual.Sandbox.create("container") as sandbox:
        sandbox.files.write("a.txt", "one\\n")
        print(sandbox.commands.run("wc -l a.txt").stdout)

The same program runs on every kind; `AsyncSandbox` is the same with await. `docs/sandbox.md` has the whole.
"""

from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.sync import Sandbox

__all__ = ["AsyncSandbox", "Sandbox"]
