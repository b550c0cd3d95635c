"""Saves a stopped machine into a file and loads it into one that waits; the file travels as an open descriptor.

QEMU itself opens nothing for this, so it needs no right to write anywhere but in its own folder. The machine's whole
memory is in the stream, pages of zeros left out.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import SnapshotFailed
from rorqual.sandbox.vm.qmp import QMP

NO_BOUND = 1 << 40  # bytes a second; QEMU would keep to 128 MiB
_ON_THE_WAY = ("setup", "active", "device", "cancelling")


async def save(qmp: QMP, target: Path, timeout_s: float, *, memory_apart: bool = False) -> None:
    """Stop the machine and write its state to a new file, synced. It stands still when this returns.

    memory_apart: its memory is in a file of its own (see `Machine.memory`) and is left out. The file gets its name once
    it is whole. Raises: SnapshotFailed; there is no file then, and `go_on` continues.
    """
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        await qmp.execute("stop")
        await _ready(qmp, memory_apart)
        await qmp.execute("migrate-set-parameters", {"max-bandwidth": NO_BOUND})
        await qmp.execute("getfd", {"fdname": "state"}, descriptor=descriptor)
        await qmp.execute("migrate", {"uri": "fd:state"})
        await asyncio.wait_for(_done(qmp), timeout_s)
        await asyncio.to_thread(os.fsync, descriptor)
        os.replace(part, target)
    except (SandboxError, TimeoutError, OSError) as error:
        raise SnapshotFailed(f"the machine's memory could not be saved to {target}: {error}.") from error
    finally:
        part.unlink(missing_ok=True)
        os.close(descriptor)


async def go_on(qmp: QMP) -> None:
    """Let a machine run that stands still, also one that is being saved: nobody waits for that any more."""
    while (await qmp.execute("query-migrate") or {}).get("status") in _ON_THE_WAY:
        await qmp.execute("migrate_cancel")
        await asyncio.sleep(0.01)
    await qmp.execute("cont")


async def load(qmp: QMP, source: Path, timeout_s: float, *, memory_apart: bool = False) -> None:
    """Load a state into a machine started with `-incoming defer`, which then stands still. Raises: SandboxError."""
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        await _ready(qmp, memory_apart)
        await qmp.execute("getfd", {"fdname": "state"}, descriptor=descriptor)
        await qmp.execute("migrate-incoming", {"uri": "fd:state"})
        await asyncio.wait_for(_done(qmp), timeout_s)
    except TimeoutError as error:
        raise SandboxError(f"the saved machine {source} was not loaded within {timeout_s:g} s.") from error
    finally:
        os.close(descriptor)


async def _ready(qmp: QMP, memory_apart: bool) -> None:
    wanted = {"events": True, "x-ignore-shared": memory_apart}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def _done(qmp: QMP) -> None:
    while True:
        event = await qmp.wait_for_event("MIGRATION")
        status = event["data"]["status"]
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            told = await qmp.execute("query-migrate")
            raise SandboxError(f"QEMU says {status}: {(told or {}).get('error-desc', 'without a reason')}")
