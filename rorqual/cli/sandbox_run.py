"""`rorqual sandbox run`: one command in a sandbox of its own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TextIO

import typer

from rorqual.cli.options import OUTPUT, Json
from rorqual.cli.sandbox_options import (
    LIMITS,
    SANDBOX,
    CpuOption,
    DiskOption,
    DriverOption,
    ImageOption,
    KindOption,
    MemoryOption,
    SnapshotOption,
    UserOption,
    check_start,
)


def run(
    command: Annotated[list[str], typer.Argument(help="Program and arguments, after --.", metavar="COMMAND...")],
    kind: KindOption = "container",
    driver: DriverOption = None,
    image: ImageOption = None,
    snapshot: SnapshotOption = None,
    user: UserOption = "agent",
    cpu: CpuOption = 1.0,
    memory_mb: MemoryOption = 512,
    disk_mb: DiskOption = 1024,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds until it is killed.", rich_help_panel=LIMITS)
    ] = 600.0,
    upload: Annotated[
        list[Path] | None,
        typer.Option("--upload", help="File or folder to copy in, under its own name.", rich_help_panel=SANDBOX),
    ] = None,
    download: Annotated[
        list[str] | None,
        typer.Option("--download", help="Path inside to copy here afterwards.", rich_help_panel=SANDBOX),
    ] = None,
    shell: Annotated[
        bool, typer.Option("--shell", "-c", help="COMMAND is one line for /bin/sh.", rich_help_panel=SANDBOX)
    ] = False,
    stdin: Annotated[bool, typer.Option("--stdin", help="Hand standard input to it.", rich_help_panel=OUTPUT)] = False,
    as_json: Json = False,
) -> None:
    """Run a command in a fresh sandbox: no network, no files of this machine but /usr. Ends with its exit code.

    \b
    rorqual sandbox run -- python3 -c 'print(6 * 7)'
    rorqual sandbox run --kind microvm --upload data -c 'wc -l data/*'
    """
    from rorqual.sandbox import Sandbox

    check_start(image, snapshot)
    data = sys.stdin.buffer.read() if stdin else None
    with Sandbox.create(
        kind,
        driver=driver,
        image=image,
        snapshot=snapshot,
        user=user,
        cpu=cpu,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        max_lifetime=timeout + 600,
    ) as sandbox:
        for path in upload or []:
            sandbox.files.upload(path, path.resolve().name)
        result = sandbox.commands.run(
            " ".join(command) if shell else command,
            timeout=timeout,
            stdin=data,
            on_stdout=None if as_json else _to(sys.stdout),
            on_stderr=None if as_json else _to(sys.stderr),
        )
        for inner in download or []:
            sandbox.files.download(inner, Path(Path(inner).name))
    if as_json:
        names = ("exit_code", "stdout", "stderr", "signal", "timed_out", "oom_killed", "duration_ms", "paused_ms")
        fields = {name: getattr(result, name) for name in names}
        typer.echo(json.dumps({**fields, "truncated_bytes": dict(result.truncated_bytes)}))
    elif result.timed_out:
        typer.echo(f"killed after {timeout:g} s (--timeout)", err=True)
    elif result.oom_killed:
        typer.echo(f"killed: {memory_mb} MiB of memory were used up (--memory-mb)", err=True)
    raise typer.Exit(result.exit_code)


def _to(stream: TextIO) -> Callable[[str], None]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write
