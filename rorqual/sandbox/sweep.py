"""Takes away what sandboxes leave: one that is ended now, and those whose client died without ending them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups, processes
from rorqual.sandbox.drivers import driver as driver_named
from rorqual.sandbox.drivers.base import Driver, Running
from rorqual.sandbox.errors import Gone
from rorqual.sandbox.home import Home, all_homes, forget_old_notes, no_new_ones
from rorqual.sandbox.images.store import Store

_logger = log.get(__name__)


async def end_home(home: Home, reason: str, driver: Driver | None = None, running: Running | None = None) -> None:
    """End a sandbox's processes, remove its mounts and groups, then its folder; fine when it is gone already.

    Raises: SandboxError listing what could not be removed; the folder stays then, so that it can be tried again.
    """
    if not home.path.exists():
        home.unlock()
        return
    left: list[str] = []
    is_whole = False
    try:
        record = home.read()
        is_whole = record.state != "preparing" and home.ended() != "crashed" and reason != "crashed"
        driver = driver or driver_named(record.spec.kind, record.driver)
        running = record.running or running
    except (Gone, ValueError, KeyError, TypeError):
        pass  # the folder of a sandbox that never came to be
    strays = home.keeper()
    for process in list(strays):
        strays += processes.below(process.pid)
    if driver is not None and running is not None:
        left += await driver.stop(running, home.path)
    left += [f"process {process.pid}" for process in await asyncio.to_thread(processes.end_all, strays)]
    if not is_whole:
        orphans = await asyncio.to_thread(processes.half_made, home.id)
        left += [f"process {process.pid}" for process in await asyncio.to_thread(processes.end_all, orphans)]
    left += await asyncio.to_thread(_end_group, home.id)
    if left:
        raise SandboxError(f"sandbox {home.id} could not be ended wholly; left are: {', '.join(left)}. Try again.")
    await asyncio.to_thread(home.remove, reason)


def _end_group(name: str) -> list[str]:
    """A control group whose maker died before it wrote it down."""
    group = cgroups.find(name)
    left = []
    if group is not None:
        left = [f"process {pid}" for pid in group.kill()] + [f"control group {path}" for path in group.remove()]
    return left + [f"control group {path}" for path in cgroups.remove_everywhere(name)]


def sweep(base: str | Path | None = None) -> list[str]:
    """Remove every sandbox that is dead and that no process drives; returns their ids. Living ones are left alone."""
    removed, unfinished = [], []
    for home in all_homes(base, driven_here=False):  # a client with thousands does not look at each for every new one
        if (home.path / "spec.json").exists() or (home.path / "exit.json").exists():
            removed += _remove_dead(home)
        else:
            unfinished.append(home)
    if unfinished:
        with no_new_ones(base):  # so that a free lock means that its maker is dead
            for home in unfinished:
                removed += _remove_dead(home)
    forget_old_notes(base)
    Store().local.drop()  # layers that a sandbox stood on whose client died before it wrote that down
    return removed


def _remove_dead(home: Home) -> list[str]:
    try:
        if not home.lock():
            return []
    except FileNotFoundError:
        return []  # another process was quicker
    try:
        reason = _dead(home)
        if reason is not None:
            asyncio.run(end_home(home, reason))
            return [home.id]
    except (SandboxError, OSError) as error:
        _logger.warning("sandbox %s could not be swept: %s", home.id, error)
    finally:
        home.unlock()
    return []


def _dead(home: Home) -> str | None:
    """Why a sandbox that nobody drives is over, or None when it lives."""
    reason = home.ended()
    if reason is not None:
        return reason
    try:
        record = home.read()
    except (Gone, ValueError, KeyError, TypeError):
        return "crashed"
    if record.running is None or record.state == "preparing":
        return "crashed"  # only its maker could have told the agent inside who it is
    if any(processes.alive(process) for process in record.running.processes):
        return None
    if home.is_suspended:
        return home.overdue()  # its memory is on disk: no process is right
    return "crashed"
