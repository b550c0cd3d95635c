"""One folder on the host for each sandbox: what was asked, what runs, who drives it.

    <data>/sandboxes/<id>/          mode 0700
        spec.json      the record: what was asked, state, incarnation, attach epoch, processes, secret
        lock           flock held by the client process that drives the sandbox; the kernel frees it when that one dies,
                       and who takes over puts one of his own in its place
        lifetime       when the keeper ends it, in milliseconds since boot; SIGHUP makes the keeper read it again
        exit.json      why it ended, written by the keeper
        channel, keeper, keeper.log, oom, history/
    <data>/sandboxes/<id>/suspended a machine's memory on disk: while it is there, no process of the sandbox has to live
    <data>/sandboxes/.making        flock held while a folder is made and not yet locked
    <data>/sandboxes/.gone/<id>     why a sandbox that is no more ended, kept for a day

No daemon: each client drives its sandboxes itself, and `sweep` takes away what dead ones left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
from rorqual.folders import data_folder
from rorqual.sandbox import bases, processes
from rorqual.sandbox.drivers.base import Process, Running
from rorqual.sandbox.errors import Gone
from rorqual.sandbox.spec import Kind, Lifetimes, Limits, SandboxSpec

TOMBSTONE_S = 86400.0
LOOK_AT_NOTES_S = 600.0
_looked: dict[Path, float] = {}
_driven: set[str] = set()
"""Folders whose locks this process holds."""
_ID = re.compile(r"[a-z0-9][a-z0-9-]{2,62}")


def sandboxes_folder(base: Path | str | None = None) -> Path:
    """Where the folders of all sandboxes lie: below `base`, or below the user's data folder."""
    return (Path(base) if base is not None else data_folder()) / "sandboxes"


@dataclasses.dataclass
class Record:
    """What spec.json holds. state: preparing, ready, paused or stopping; a dead one has an exit.json beside it."""

    id: str
    driver: str
    spec: SandboxSpec
    created: float
    state: str = "preparing"
    incarnation: int = 1
    attach_epoch: int = 1
    running: Running | None = None
    owner: int = 0
    """Process that drives it, for messages only; the lock decides."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that `to_json` wrote."""
        spec = dict(data["spec"])
        spec["limits"] = Limits(**spec["limits"])
        spec["lifetimes"] = Lifetimes(**spec["lifetimes"])
        spec["layers"] = tuple(spec["layers"])
        running = data["running"]
        if running is not None:
            running = Running(**{**running, "processes": [Process(**one) for one in running["processes"]]})
        return cls(**{**data, "spec": SandboxSpec(**spec), "running": running})


class Home:
    """The folder of one sandbox."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self._lock: int | None = None

    @classmethod
    def make(cls, kind: Kind, base: Path | str | None = None) -> Home:
        """A new folder with a new id, locked by this process."""
        parent = sandboxes_folder(base)
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if base is not None:
            bases.register(base)
        home = cls(parent / f"{kind}-{secrets.token_hex(6)}")
        with open(parent / ".making", "a") as making:
            fcntl.flock(making, fcntl.LOCK_SH)
            home.path.mkdir(mode=0o700)
            while not home.lock():
                time.sleep(0.001)  # a sweep is looking at the new folder
        return home

    @classmethod
    def find(cls, sandbox_id: str, base: Path | str | None = None) -> Home:
        """The folder of a sandbox that exists, below `base` or any folder with sandboxes. Raises: Gone."""
        if not _ID.fullmatch(sandbox_id):
            raise SandboxError(f"{sandbox_id!r} is no sandbox id. Sandbox.list() shows them.")
        parents = [sandboxes_folder(one) for one in ([base] if base is not None else bases.known())]
        for parent in parents:
            if (parent / sandbox_id / "spec.json").exists():
                return cls(parent / sandbox_id)
        ended = [parent for parent in parents if (parent / ".gone" / sandbox_id).exists()]
        raise gone(sandbox_id, reason_of((ended or parents)[0], sandbox_id))

    @property
    def base(self) -> Path:
        """The data folder that it lies in."""
        return self.path.parent.parent

    @property
    def is_suspended(self) -> bool:
        """Whether its memory is on disk; what processes of it still live stand still and may be ended."""
        return (self.path / "suspended").exists()

    def lock(self) -> bool:
        """Become the process that drives this sandbox; False when another one does."""
        if self._lock is not None:
            return True
        while True:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_current = os.path.samestat(os.fstat(descriptor), os.stat(self.path / "lock"))
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
            if is_current:
                self._lock = descriptor
                _driven.add(str(self.path))
                return True
            os.close(descriptor)  # it was taken over in this moment, and this is the old one

    def take_lock(self) -> None:
        """Become the process that drives it although another does, whose lock is worth nothing from now on.

        Only inside `editing`, together with a higher epoch: that is what keeps the other from acting.
        """
        scratch = self.path / f"lock.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(scratch, self.path / "lock")
        self._lock = descriptor
        _driven.add(str(self.path))

    def unlock(self) -> None:
        """Let another process drive it."""
        if self._lock is not None:
            _driven.discard(str(self.path))
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def editing(self) -> Iterator[Record]:
        """Read the record, let the caller change it, write it back; one process at a time."""
        with open(self.path / "record.lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            record = self.read()
            yield record
            self.write(record)

    def read(self) -> Record:
        """The record. Raises: Gone when the sandbox is no more."""
        try:
            return Record.from_json(json.loads((self.path / "spec.json").read_text()))
        except FileNotFoundError:
            raise gone(self.id, reason_of(self.path.parent, self.id)) from None

    def write(self, record: Record) -> None:
        """Put the record in place by one rename; only its owner may read it, since it holds the channel's secret."""
        scratch = self.path / f"spec.{os.getpid()}.{secrets.token_hex(4)}"
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(record.to_json(), file, indent=1)
        os.replace(scratch, self.path / "spec.json")

    def set_deadlines(self, deadlines: dict[str, float], running: Running | None = None) -> None:
        """Tell the keeper when to end it: reason -> seconds from now; an infinite one is left out."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        lines = [f"{int((now + s) * 1000)} {why}\n" for why, s in deadlines.items() if s != float("inf")]
        scratch = self.path / "lifetime.new"
        scratch.write_text("".join(lines))
        os.replace(scratch, self.path / "lifetime")
        if running is not None and running.processes:
            processes.send(running.processes[0], signal.SIGHUP)

    def overdue(self) -> str | None:
        """Which of its times is over, for a sandbox without a keeper to notice; None when none is."""
        try:
            lines = [line.split() for line in (self.path / "lifetime").read_text().splitlines()]
        except FileNotFoundError:
            return None
        now = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000
        over = sorted((float(at), why) for at, why in lines if float(at) <= now)
        return over[0][1] if over else None

    def ended(self) -> str | None:
        """Why the sandbox ended, as its keeper wrote it; None while it runs, is being made, or needs no process."""
        if self.is_suspended:
            return None
        try:
            return str(json.loads((self.path / "exit.json").read_text())["reason"])
        except FileNotFoundError:
            return None if self.path.exists() else reason_of(self.path.parent, self.id)
        except (OSError, ValueError, KeyError):
            return "crashed"

    def keeper(self) -> list[Process]:
        """Keeper and holder as the keeper itself wrote them down: known also when the client died right after."""
        found = []
        with contextlib.suppress(OSError, ValueError):
            numbers = [int(word) for word in (self.path / "keeper").read_text().split()]
            for pid, started in zip(numbers[::2], numbers[1::2], strict=True):
                process = Process(pid, started)
                if processes.alive(process):
                    found.append(process)
        return found

    def remove(self, reason: str) -> None:
        """Take the folder away and leave a note of why."""
        notes = self.path.parent / ".gone"
        notes.mkdir(mode=0o700, exist_ok=True)
        (notes / self.id).write_text(reason)
        for _ in range(50):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                break
            time.sleep(0.002)  # a sweep looked at it in this moment, and made its lock anew
        else:
            shutil.rmtree(self.path)
        self.unlock()


@contextlib.contextmanager
def no_new_ones(base: Path | str | None = None) -> Iterator[None]:
    """Meanwhile no folder is made, and every one that is there is locked if its maker lives."""
    with open(sandboxes_folder(base) / ".making", "a") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        yield


def reason_of(parent: Path, sandbox_id: str) -> str:
    """Why a sandbox whose folder is gone ended."""
    try:
        return (parent / ".gone" / sandbox_id).read_text() or "closed"
    except OSError:
        return "never existed"


def gone(sandbox_id: str, reason: str) -> Gone:
    """The error for a sandbox that is no more."""
    told = {
        "closed": "it was closed",
        "idle": "nobody used it for its idle_ttl",
        "lifetime": "its max_lifetime was over",
        "paused": "it stayed paused for longer than its paused_ttl",
        "crashed": "its first process ended",
        "never existed": "no sandbox of that name is known here",
    }.get(reason, reason)
    return Gone(f"sandbox {sandbox_id} is gone: {told}. Create a new one, from a snapshot if there is one.", reason)


def all_homes(base: Path | str | None = None, *, driven_here: bool = True) -> list[Home]:
    """Every folder that may be a sandbox's, by name; without `driven_here` not those that this process drives."""
    try:
        with os.scandir(sandboxes_folder(base)) as entries:
            found = sorted(
                entry.path
                for entry in entries
                if (driven_here or entry.path not in _driven) and _ID.fullmatch(entry.name) and entry.is_dir()
            )
    except FileNotFoundError:
        return []
    return [Home(Path(path)) for path in found]


def forget_old_notes(base: Path | str | None = None) -> None:
    """Drop notes about sandboxes that ended more than a day ago; looks once in ten minutes, since there may be many."""
    notes = sandboxes_folder(base) / ".gone"
    last = _looked.get(notes)
    if last is not None and time.monotonic() - last < LOOK_AT_NOTES_S:
        return
    _looked[notes] = time.monotonic()
    for path in notes.iterdir() if notes.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > TOMBSTONE_S:
                path.unlink()
