"""The `rorqual` command: one file a command; each parses, calls the room that does the work, and prints.

`rorqual/cli/NAME.py` defines a function called `NAME`. Its parameters are typer options and its docstring is
its help: one sentence, then two examples. `app.COMMANDS` lists it with the sentence `rorqual --help` shows,
so that help answers without importing any command (and so without torch).

Exit codes: 0 fine, 1 the task failed, 2 the request was wrong.
"""

from rorqual.cli.app import COMMANDS, build_app, main

__all__ = ["COMMANDS", "build_app", "main"]
