"""`rorqual sandbox`: a group of commands, each in a file of its own."""

import typer

from rorqual.cli.sandbox_image import image

sandbox = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@sandbox.callback()
def about() -> None:
    """Sandboxes on this machine and what they stand on.

    \b
    rorqual sandbox image build debian-12
    rorqual sandbox image list
    """


sandbox.command("image")(image)
