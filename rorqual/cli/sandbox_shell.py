"""`rorqual sandbox shell`: a terminal in a sandbox."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import termios
import tty
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.sandbox_options import (
    CpuOption,
    DiskOption,
    DriverOption,
    ImageOption,
    KindOption,
    MemoryOption,
    SnapshotOption,
    UserOption,
    check_start,
    given,
)
from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.sandbox.spec import Kind


def shell(
    ctx: typer.Context,
    sandbox_id: Annotated[
        str | None, typer.Argument(help="A sandbox that lives; a new one otherwise.", metavar="ID")
    ] = None,
    kind: KindOption = "container",
    driver: DriverOption = None,
    image: ImageOption = None,
    snapshot: SnapshotOption = None,
    user: UserOption = "agent",
    cpu: CpuOption = 1.0,
    memory_mb: MemoryOption = 512,
    disk_mb: DiskOption = 1024,
) -> None:
    """Open a shell in a sandbox; a new one is ended when the shell ends.

    \b
    rorqual sandbox shell
    rorqual sandbox shell --kind microvm --image debian-12

    With an ID it opens one in a sandbox that is there, which has its kind, image and limits already.
    """
    written = given(ctx, "kind", "driver", "image", "snapshot", "user", "cpu", "memory_mb", "disk_mb")
    if sandbox_id is not None and written:
        raise ConfigError(
            f"{', '.join(written)}: of a new sandbox, and {sandbox_id} is there already, so this would change nothing. "
            "Leave the options out, or leave the ID out for a new sandbox."
        )
    check_start(image, snapshot)
    if not sys.stdin.isatty():
        raise ConfigError("`sandbox shell` needs a terminal. For a single command use `rorqual sandbox run`.")
    wanted = {
        "driver": driver,
        "image": image,
        "snapshot": snapshot,
        "user": user,
        "cpu": cpu,
        "memory_mb": memory_mb,
        "disk_mb": disk_mb,
    }
    raise typer.Exit(asyncio.run(_talk(sandbox_id, kind, wanted)))


async def _talk(sandbox_id: str | None, kind: "Kind", wanted: dict[str, Any]) -> int:
    from rorqual.sandbox import AsyncSandbox

    if sandbox_id is not None:
        sandbox = await AsyncSandbox.connect(sandbox_id)
    else:
        sandbox = await AsyncSandbox.create(kind, **wanted)
    loop = asyncio.get_running_loop()
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        size = shutil.get_terminal_size()
        terminal = await sandbox.pty.open(size.columns, size.lines, on_data=_show)
        typed: asyncio.Queue[bytes] = asyncio.Queue()
        tty.setraw(keyboard)
        loop.add_reader(keyboard, lambda: typed.put_nowait(os.read(keyboard, 4096)))

        def resized() -> None:
            now = shutil.get_terminal_size()
            loop.create_task(terminal.resize(now.columns, now.lines))

        loop.add_signal_handler(signal.SIGWINCH, resized)

        async def send() -> None:
            while data := await typed.get():
                await terminal.write(data)

        sending = asyncio.ensure_future(send())
        result = await terminal.wait()
        sending.cancel()
        return result.exit_code
    finally:
        with contextlib.suppress(Exception):
            loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        await (sandbox.detach() if sandbox_id is not None else sandbox.close())


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
