"""Host processes told apart by number and start time, so that none but our own is ever signalled."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from rorqual.sandbox.drivers.base import Process


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started; None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def identify(pid: int) -> Process | None:
    """The process that has this number now."""
    started = start_time(pid)
    return None if started is None else Process(pid, started)


def alive(process: Process) -> bool:
    """Whether that very process still runs."""
    return start_time(process.pid) == process.start_time


def send(process: Process, number: int) -> bool:
    """Signal that very process; False when it is gone or not ours."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if not alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def below(pid: int) -> list[Process]:
    """All descendants of a process, parents first; children of every thread count (runc has many)."""
    found: list[Process] = []
    todo = [pid]
    while todo:
        number = todo.pop(0)
        children: list[str] = []
        with contextlib.suppress(OSError):  # it may end at any moment
            for thread in os.listdir(f"/proc/{number}/task"):
                with contextlib.suppress(OSError):
                    children += Path(f"/proc/{number}/task/{thread}/children").read_text().split()
        for child in map(int, children):
            process = identify(child)
            if process is not None:
                found.append(process)
                todo.append(child)
    return found


def half_made(sandbox_id: str) -> list[Process]:
    """Children of bwrap that wait for ever for a parent that was killed before they could ask for a death signal.

    They belong to nobody's tree any more, but the command line is still bwrap's, with the sandbox's host name in it.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"bwrap") and (b"--hostname", sandbox_id.encode()) in pairwise(words):
            process = identify(int(path.parent.name))
            if process is not None:
                found.append(process)
    return found


def end_all(processes: Iterable[Process], within_s: float = 5.0) -> list[Process]:
    """Kill these processes, the first first, and wait until they are gone; returns those that are not."""
    left = [process for process in processes if alive(process)]
    for process in left:
        send(process, signal.SIGKILL)
    end = time.monotonic() + within_s
    pause = 0.001
    while left := [process for process in left if alive(process)]:
        if time.monotonic() > end:
            break
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return left
