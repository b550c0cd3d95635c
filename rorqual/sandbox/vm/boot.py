"""Starts a machine under its keeper and ends it: what templates, sandboxes and restored snapshots have in common."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups, processes
from rorqual.sandbox.agent.build import agent_binary
from rorqual.sandbox.drivers.base import Process
from rorqual.sandbox.drivers.bwrap import launch
from rorqual.sandbox.host_ids import fresh_uid
from rorqual.sandbox.spec import Limits
from rorqual.sandbox.vm.machine import Machine, command
from rorqual.sandbox.vm.qmp import QMP

MONITOR_MB = 384
"""Host memory beside the guest's own: QEMU itself, its buffers, and code translated under emulation."""
MONITOR_THREADS = 256
MONITOR_WAIT_S = 15.0
"""How long a monitor may take until its control socket answers."""


@dataclass(frozen=True)
class Started:
    """A machine's host side. walls: what stands around QEMU; cgroups and enforced: as in `Running`."""

    processes: list[Process]
    cgroups: list[str]
    enforced: dict[str, str]
    uid: int | None


def own_folder(home: Path, uid: int | None) -> Path:
    """The machine's folder below `home`, which QEMU's user alone can enter."""
    folder = home / "vm"
    folder.mkdir(mode=0o700, exist_ok=True)
    hand_over(folder, uid)
    return folder


def hand_over(path: Path, uid: int | None) -> None:
    """Make QEMU's user the owner of a file, where it has one of its own."""
    if uid is not None:
        os.chown(path, uid, uid)


def new_uid() -> int | None:
    """A host user for one machine when root starts it; None for an ordinary user, whose own it is."""
    return fresh_uid() if os.geteuid() == 0 else None


def start(machine: Machine, home: Path, uid: int | None, name: str, cpu: float) -> Started:
    """Start QEMU below a keeper of its own; returns once it runs. Raises: SandboxError, leaving nothing.

    name: of the control group; cpu: processors' worth of time, beyond the number of virtual ones.
    """
    words, walls = command(machine, uid)
    enforced = {"vmm": walls}
    for socket in ("agent", "control", "qmp"):
        (machine.folder / socket).unlink(missing_ok=True)
    limits = Limits(cpu=cpu, memory_mb=machine.memory_mb + MONITOR_MB, pids=MONITOR_THREADS)
    group = cgroups.create(name, limits)
    keeper = [str(agent_binary()), "keep", "--home", str(home), "--plain", "yes", "--", *words]
    try:
        running = list(launch(keeper, home, group))
    except BaseException:
        if group is not None:
            group.kill()
            group.remove()
        raise
    if group is not None:
        told = group.describe()
        enforced |= {"cpu": f"{machine.cpus} virtual processors, {told.get('cpu', 'no quota')}"}
        enforced |= {"host_memory": told.get("memory", "none")}
    else:
        enforced |= {"cpu": f"{machine.cpus} virtual processors"}
    return Started(running, group.paths if group is not None else [], enforced, uid)


async def monitor(folder: Path, home: Path, timeout_s: float) -> QMP:
    """QEMU's control connection. Raises: SandboxError with QEMU's own last words when it did not come up."""
    try:
        return await QMP.connect(folder / "qmp", timeout_s)
    except SandboxError as error:
        raise SandboxError(f"QEMU did not come up: {last_words(home) or error}.") from error


def last_words(home: Path) -> str:
    """What QEMU and its keeper wrote to standard error, its end."""
    try:
        return (home / "keeper.log").read_text(errors="replace").strip()[-600:]
    except OSError:
        return ""


def end(processes_: list[Process], groups: list[str]) -> list[str]:
    """End a machine's processes and remove its control group; what could not be removed."""
    tree = list(processes_)
    for process in processes_:
        if processes.alive(process):
            tree += [below for below in processes.below(process.pid) if below not in tree]
    left = [f"process {process.pid}" for process in processes.end_all(tree)]
    if groups:
        group = cgroups.adopt(groups)
        left += [f"process {pid}" for pid in group.kill()]
        left += [f"control group {path}" for path in group.remove()]
    return left


async def end_later(started: Started) -> list[str]:
    """`end` off the loop."""
    return await asyncio.to_thread(end, started.processes, started.cgroups)
