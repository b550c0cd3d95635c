"""`rorqual sandbox`: a group of commands, each in a file of its own."""

import typer

from rorqual.cli.sandbox_doctor import doctor
from rorqual.cli.sandbox_image import image
from rorqual.cli.sandbox_manage import end, list_, prune
from rorqual.cli.sandbox_run import run
from rorqual.cli.sandbox_shell import shell

sandbox = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@sandbox.callback()
def about() -> None:
    """Run commands in sandboxes on this machine, and look after them and what they stand on.

    \b
    rorqual sandbox run -- python3 -c 'print(6 * 7)'
    rorqual sandbox doctor
    """


sandbox.command("run")(run)
sandbox.command("shell")(shell)
sandbox.command("list")(list_)
sandbox.command("end")(end)
sandbox.command("prune")(prune)
sandbox.command("doctor")(doctor)
sandbox.command("image")(image)
