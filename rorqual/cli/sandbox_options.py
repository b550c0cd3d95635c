"""Options that say what kind of sandbox a command makes."""

from typing import Annotated, Literal

import typer

from rorqual.errors import ConfigError

SANDBOX, LIMITS = "Sandbox", "Limits"

KindOption = Annotated[
    Literal["function", "container", "microvm", "vm"],
    typer.Option("--kind", help="function, container, microvm or vm.", rich_help_panel=SANDBOX),
]
DriverOption = Annotated[
    str | None,
    typer.Option(
        "--driver", help="One of those `doctor` lists; the best that works otherwise.", rich_help_panel=SANDBOX
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", help="Name of an image; else this machine's /usr, read-only.", rich_help_panel=SANDBOX),
]
SnapshotOption = Annotated[
    str | None, typer.Option("--snapshot", help="Id of a snapshot to start from.", rich_help_panel=SANDBOX)
]
UserOption = Annotated[
    Literal["agent", "root"],
    typer.Option("--user", help="Who commands run as inside; root has no powers outside.", rich_help_panel=SANDBOX),
]
CpuOption = Annotated[float, typer.Option("--cpu", min=0.01, help="Cores.", rich_help_panel=LIMITS)]
MemoryOption = Annotated[int, typer.Option("--memory-mb", min=16, help="Memory in MiB.", rich_help_panel=LIMITS)]
DiskOption = Annotated[int, typer.Option("--disk-mb", min=1, help="Disk in MiB.", rich_help_panel=LIMITS)]


def given(ctx: typer.Context, *names: str) -> list[str]:
    """Those of these parameters that were written on the command line, as one writes them."""
    written = []
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            written.append(f"--{name.replace('_', '-')}")
    return written


def check_start(image: str | None, snapshot: str | None) -> None:
    """Raises: ConfigError when both are named: a snapshot has its image in it."""
    if image is not None and snapshot is not None:
        raise ConfigError(
            f"--image {image} and --snapshot {snapshot} cannot be given together: a snapshot has its image in it. "
            "Leave one of them out."
        )
