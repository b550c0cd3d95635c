"""Disks for a journal's tests: one that does not sync, one that fails or waits where told, one that remembers all."""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from rorqual.journal import Close, Event, Record, Request, Reward, Tokens, ToolCall, ToolResult
from rorqual.journal.disk import Disk
from rorqual.journal.state import NAME as STATE

SECTOR_BYTES = 512


def some_records(number: int, seed: int = 0) -> list[Record]:
    """Records of several kinds and sizes, requests opened and closed."""
    random, records = Random(seed), list[Record]()
    for place in range(number):
        request = place // 20
        kind = place % 20
        if kind == 0:
            records.append(Request(f"trajectory-{request}", request, sampling={"temperature": 0.7}, model_id="minke"))
        elif kind == 8:
            records.append(ToolCall(request, 0, "shell", '["true"]', random.randbytes(16), sandbox_id="c-1"))
        elif kind == 9:
            output = random.randbytes(random.choice([0, 3, 700]))
            records.append(ToolResult(request, 0, random.randbytes(16), output=output, observation_ids=(1, 2, 3)))
        elif kind == 15:
            records.append(Event("LIMIT_HIT", {"what": "pids", "values": [1, {"deep": b"\0" * place}]}))
        elif kind == 18:
            records.append(Reward(request, {"right": 1.0}))
        elif kind == 19:
            records.append(Close(request, "stop", {"tokens": 12}))
        else:
            count = random.choice([1, 1, 1, 4])
            ids = tuple(random.randrange(129_280) for _ in range(count))
            records.append(Tokens(request, kind, 3, ids, tuple(-0.5 * k for k in range(count))))
    return records


class QuietDisk(Disk):
    """Real files without real syncs: for what does not test syncing."""

    def __init__(self) -> None:
        super().__init__()
        self._synced_writes = False

    def sync(self, descriptor: int) -> None:
        """Nothing."""

    def sync_folder(self, path: Path) -> None:
        """Nothing."""

    def flush(self, mapping: mmap.mmap) -> None:
        """Nothing."""


class HookedDisk(QuietDisk):
    """Calls `before(data)` and `after(data)` around each synced write of a segment's frames; they may wait or raise."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[bytes], None] = lambda _: None
        self.after: Callable[[bytes], None] = lambda _: None
        self.num_synced = 0

    def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
        """See `Disk`."""
        is_frames = synced and offset > 0 and any(data)
        if is_frames:
            self.before(data)
        super().write(descriptor, data, offset, synced=synced)
        if is_frames:
            self.num_synced += 1
            self.after(data)


class Gate:
    """A place where a thread waits until it is let through."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self, _: bytes) -> None:
        self.reached.set()
        assert self._open.wait(30)

    def open(self) -> None:
        """Let through."""
        self._open.set()


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)


class RecordingDisk(Disk):
    """Remembers every change in order, and which of them a sync made durable, so that `lose_power` can be played."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._synced_writes = False
        self._folder = folder
        self._files: dict[int, int] = {}
        self._num_files = 0
        self.log: list[tuple[object, ...]] = []
        self.fails = False
        """Whether the sync of the next frames fails, after they were written."""

    def create(self, path: Path) -> int:
        """See `Disk`."""
        descriptor = super().create(path)
        self._num_files += 1
        self._files[descriptor] = self._num_files
        self.log.append(("create", path.name, self._num_files))
        return descriptor

    def open(self, path: Path) -> int:
        """See `Disk`; the file is the one that had the name in the log."""
        descriptor = super().open(path)
        self._files[descriptor] = _names(self.log)[path.name]
        return descriptor

    def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
        """See `Disk`. A synced write says nothing about other writes, as with RWF_DSYNC."""
        self.log.append(("write", self._files[descriptor], offset, bytes(data)))
        super().write(descriptor, data, offset, synced=False)
        if synced and self.fails and offset > 0 and any(data):
            self.fails = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if synced:
            self.log.append(("written", self._files[descriptor], offset, bytes(data)))

    def sync(self, descriptor: int) -> None:
        """See `Disk`."""
        self.log.append(("sync", self._files[descriptor]))

    def truncate(self, descriptor: int, size: int) -> None:
        """See `Disk`."""
        super().truncate(descriptor, size)
        self.log.append(("truncate", self._files[descriptor], size))

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk`."""
        super().rename(old, new)
        self.log.append(("rename", old.name, new.name))

    def unlink(self, path: Path) -> None:
        """See `Disk`."""
        if path.exists():
            super().unlink(path)
            self.log.append(("unlink", path.name))

    def sync_folder(self, path: Path) -> None:
        """See `Disk`."""
        if path == self._folder:
            self.log.append(("sync folder",))

    def flush(self, mapping: mmap.mmap) -> None:
        """See `Disk`."""

    def acknowledge(self, lsn: int) -> None:
        """Note that records to `lsn` are acknowledged, and what the state file's memory holds now."""
        self.log.append(("state", (self._folder / STATE).read_bytes()))
        self.log.append(("acknowledged", lsn))


def lose_power(log: list[tuple[object, ...]], random: Random, folder: Path) -> int:
    """Write to `folder` what a disk may hold when power goes after `log`; the LSN that was acknowledged by then.

    Of what no sync covers, each sector of each write is there or not, each truncation too, and of the names' changes
    some first ones. The memory of the state file is as old as chance will have it.
    """
    files: dict[int, _File] = {}
    names: dict[str, int] = {}
    changes: list[tuple[object, ...]] = []
    states: list[bytes] = []
    acknowledged = 0
    for entry in log:
        match entry:
            case ("create", _, int(number)):
                files[number] = _File()
                changes.append(entry)
            case ("rename" | "unlink", *_):
                changes.append(entry)
            case ("write", int(number), int(offset), bytes(data)):
                files[number].pending.append(("write", offset, data))
            case ("written", int(number), int(offset), bytes(data)):
                files[number].pending.remove(("write", offset, data))
                _put(files[number].durable, offset, data)
            case ("truncate", int(number), int(size)):
                files[number].pending.append(("truncate", size, b""))
            case ("sync", int(number)):
                for change in files[number].pending:
                    _apply(files[number].durable, change)
                files[number].pending.clear()
            case ("sync folder",):
                names = _names(changes, names)
                changes = []
            case ("state", bytes(data)):
                states.append(data)
            case ("acknowledged", int(lsn)):
                acknowledged = lsn
    names = _names(changes[: random.randint(0, len(changes))], names)
    for name, number in names.items():
        data = bytearray(files[number].durable)
        for change in _survivors(files[number].pending, random):
            _apply(data, change)
        if name == STATE and states and random.random() < 0.8:
            data = bytearray(random.choice(states[-4:]))
        (folder / name).write_bytes(data)
    return acknowledged


def _names(changes: list[tuple[object, ...]], names: dict[str, int] | None = None) -> dict[str, int]:
    names = dict(names or {})
    for entry in changes:
        match entry:
            case ("create", str(name), int(number)):
                names[name] = number
            case ("rename", str(old), str(new)):
                names[new] = names.pop(old)
            case ("unlink", str(name)):
                del names[name]
    return names


def _survivors(pending: list[tuple[str, int, bytes]], random: Random) -> Iterator[tuple[str, int, bytes]]:
    for kind, offset, data in pending:
        share = random.choice([0.0, 0.5, 0.9, 1.0])
        if kind == "truncate":
            if random.random() < share:
                yield kind, offset, data
            continue
        at = 0
        while at < len(data):
            size = min(SECTOR_BYTES - (offset + at) % SECTOR_BYTES, len(data) - at)
            if random.random() < share:
                yield "write", offset + at, data[at : at + size]
            at += size


def _apply(data: bytearray, change: tuple[str, int, bytes]) -> None:
    kind, offset, new = change
    if kind == "write":
        _put(data, offset, new)
    elif offset <= len(data):
        del data[offset:]
    else:
        data.extend(bytes(offset - len(data)))


def _put(data: bytearray, offset: int, new: bytes) -> None:
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(new)] = new


def copy_cut(source: Path, target: Path, segment: str | None = None, size: int | None = None) -> None:
    """Copy a journal's folder; with `segment` and `size` as if it had been cut there, so without later segments."""
    target.mkdir()
    for name in os.listdir(source):
        if segment is not None and name.endswith((".seg", ".col")) and name > segment:
            continue
        data = (source / name).read_bytes()
        (target / name).write_bytes(data[:size] if name == segment else data)
