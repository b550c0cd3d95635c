"""The disk cache: pages and window checkpoints in segment files, found by their chain keys.

Nothing is trusted: headers are checked when a folder is opened, contents when they are read, and what is damaged is
discarded with one line in the log, so a process may be killed at any moment. Writing happens on a thread of its own,
from a queue of bounded size; what does not fit is simply not stored. Several processes may share a folder: each writes
segments of its own and reads all. Deleting takes the segment used longest ago, checkpoints counting as older than they
are. Source: V4 report on on-disk storage; the record discipline of colibri.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual import log
from rorqual.engine.store import records, segments
from rorqual.engine.store.checksum import checksum, checksums
from rorqual.engine.store.records import Header
from rorqual.engine.store.segments import Segment
from rorqual.engine.store.stored import Stored, announce, read_ahead, spans_of
from rorqual.engine.store.tree import chain_key

logger = log.get(__name__)

SEGMENT_BYTES = 64 << 20
QUEUE_BYTES = 256 << 20
RUN_BYTES = 512 << 10
"""Pages that lie one behind the other are read, checked and handed on by so much at a time: they stay in the
processor's cache meanwhile, and the system, which sees a file read from front to back, fetches what comes next.
"""

POINT_AGE = 4.0
"""A checkpoint segment counts as so many times older than it is when room is needed."""

REFRESH_S = 2.0


@dataclass
class DiskStats:
    """Bytes and records moved since the store was opened."""

    pages_read: int = 0
    points_read: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    bytes_written: int = 0
    records_written: int = 0
    not_written: int = 0
    """Records dropped because the queue, the write budget or the disk was full."""
    discarded: int = 0
    """Records found damaged."""
    segments_deleted: int = 0


class DiskStore:
    """A folder of at most `budget` bytes, for state of one fingerprint.

    write_bytes_per_hour: no more is written than that (end-of-output saves may use the last quarter, others not).
    Raises OSError when the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: bytes,
        budget: int,
        write_bytes_per_hour: int | None = None,
    ) -> None:
        self.folder = Path(folder) / fingerprint.hex()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.budget, self.fingerprint = budget, fingerprint
        self.segment_bytes = max(1 << 16, min(SEGMENT_BYTES, budget // 16))
        self.stats = DiskStats()
        self._per_hour = write_bytes_per_hour
        self._allowance, self._refilled = float(write_bytes_per_hour or 0), time.monotonic()
        self._segments: dict[str, Segment] = {}
        self._strangers: set[str] = set()  # files that are no segments of this cache
        self._own: dict[str, Segment] = {}  # by suffix: those this process appends to
        self._pages: dict[bytes, Stored] = {}
        self._points: dict[bytes, dict[bytes, Stored]] = {}  # by key of the page before, then tail
        self._children: dict[bytes, set[bytes]] = {}
        self._coming: set[tuple[bytes, bytes | None]] = set()
        self._number = 0
        self._scratch = np.empty(0, dtype=np.uint8)
        self._lock = threading.RLock()
        self._queue: queue.Queue[tuple[Header, bytes, NDArray[np.uint8]] | None] = queue.Queue()
        self._queued_bytes = 0
        self._refreshed = 0.0
        self.refresh(force=True)
        self._make_room(0)
        self._writer = threading.Thread(target=self._write_all, name="rorqual-disk-cache", daemon=True)
        self._writer.start()

    # What is there

    def refresh(self, force: bool = False) -> None:
        """Learn what other processes wrote since the last look (at most every two seconds, unless forced)."""
        now = time.monotonic()
        if not force and now - self._refreshed < REFRESH_S:
            return
        self._refreshed = now
        with self._lock:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(segments.SUFFIXES))
            for name in set(self._segments) - set(names):
                self._forget(self._segments[name])
            for name in names:
                if name in self._strangers:
                    continue
                segment = self._segments.get(name) or segments.open_segment(
                    self.folder / name, self.fingerprint, self._strangers
                )
                if segment is None or segment.is_own:
                    continue
                self._segments[name] = segment
                for offset, header in segments.scan(segment):
                    self._learn(Stored(segment, offset, header))

    def find_page(self, key: bytes, block: bytes) -> Stored | None:
        """The page of this chain key and these token ids."""
        found = self._pages.get(key)
        return found if found is not None and found.header.tokens == block else None

    def find_next(self, key: bytes, block: bytes) -> Stored | None:
        """The page of these token ids behind the page of `key`."""
        children = self._children.get(key, ())
        if len(children) == 1:  # in the midst of a text: no hash is needed
            [child] = children
            found = self._pages.get(child)
            return found if found is not None and found.header.tokens == block else None
        return self.find_page(chain_key(key, block), block)

    def find_points(self, key: bytes) -> list[Stored]:
        """Window checkpoints behind the page of this chain key."""
        return list(self._points.get(key, {}).values())

    def find_children(self, key: bytes) -> list[Stored]:
        """Pages that follow the page of this chain key."""
        return [self._pages[child] for child in self._children.get(key, ()) if child in self._pages]

    def has_page(self, key: bytes) -> bool:
        """Whether this page is stored or about to be."""
        return key in self._pages or (key, None) in self._coming

    def has_point(self, key: bytes, tail: bytes) -> bool:
        """Whether this checkpoint is stored or about to be."""
        return tail in self._points.get(key, {}) or (key, tail) in self._coming

    @property
    def nbytes(self) -> int:
        """Bytes of all segments known."""
        with self._lock:
            return sum(segment.nbytes for segment in self._segments.values())

    # Reading

    def read_pages(self, stored: Sequence[Stored], sink: Callable[[int, Tensor], None]) -> int:
        """Read consecutive pages of a text; returns how many are sound from the first on.

        sink: takes the place of the first page of a piece among `stored`, and the piece's bytes uint8 [n, page_bytes],
        which it must not keep. The first page that is damaged is discarded, and those behind it are not read; nor are
        those of a file that has been deleted for room since the page was found.
        """
        began = time.perf_counter()
        done = 0
        spans = spans_of(stored)
        with self._lock:
            announce(stored, spans)
        for first, end in spans:
            step = max(1, RUN_BYTES // stored[first].header.nbytes)
            for at in range(first, end, step):
                run = stored[at : min(end, at + step)]
                with self._lock:  # so that no file is closed (and its number given to another) meanwhile
                    content = self._read_run(run) if run[0].segment.fd >= 0 else None
                    if content is not None and len(content):
                        sink(at, content)
                        done += len(content)
                        self.stats.bytes_read += content.numel()
                if content is None or len(content) < len(run):
                    return self._have_read(done, began)
        return self._have_read(done, began)

    def _have_read(self, done: int, began: float) -> int:
        self.stats.pages_read += done
        self.stats.read_s += time.perf_counter() - began
        return done

    def expect(self, first: Stored, count: int) -> None:
        """Let the system begin to read up to `count` pages from `first` on, while they are looked up one by one."""
        read_ahead(first.segment.path, first.offset, count * first.header.nbytes, RUN_BYTES)

    def read_point(self, stored: Stored) -> tuple[Tensor, Tensor | None] | None:
        """A checkpoint's content uint8 [n] and the hidden state fp32 [D] of its last token; None when it is
        damaged, or its file has been deleted for room since it was found.
        """
        header = stored.header
        with self._lock:
            if stored.segment.fd < 0:
                return None
            buffer = np.empty(header.data_bytes, dtype=np.uint8)
            data = self._read(stored, stored.offset + header.data_at, buffer)
            if data is None or checksum(data.view(np.uint64)) != header.content_sum:
                self._discard(stored)
                return None
        self.stats.points_read += 1
        self.stats.bytes_read += len(data)
        hidden = torch.from_numpy(data[: header.hidden_bytes]).view(torch.float32) if header.hidden_bytes else None
        content = torch.from_numpy(data[header.hidden_bytes : header.hidden_bytes + header.content_bytes])
        return content, hidden

    def _read_run(self, run: Sequence[Stored]) -> Tensor:
        """The contents uint8 [n, page_bytes] of the sound records of a run, from the first on."""
        header, size = run[0].header, run[0].header.nbytes
        if len(run) * size > len(self._scratch):  # kept, since fresh memory costs more than reading into it
            self._scratch = np.empty(len(run) * size, dtype=np.uint8)
        rows = self._scratch[: len(run) * size].reshape(len(run), size)
        if self._read(run[0], run[0].offset, rows.reshape(-1)) is None:
            self._discard(run[0])
            return _contents(rows[:0], header)
        sums = checksums(rows.view(np.uint64)[:, header.data_at // 8 :])
        for sound, (total, one) in enumerate(zip(sums, run, strict=True)):
            if total != one.header.content_sum:
                self._discard(one)
                return _contents(rows[:sound], header)
        return _contents(rows, header)

    @staticmethod
    def _read(stored: Stored, offset: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        try:
            got = os.preadv(stored.segment.fd, [buffer.data], offset)
            stored.segment.touch(time.time())
        except OSError as error:
            logger.warning("%s cannot be read (%s); its records are discarded", stored.segment.path, error)
            return None
        return buffer if got == len(buffer) else None

    def _discard(self, stored: Stored) -> None:
        self.stats.discarded += 1
        logger.warning(
            "%s: the record at byte %d is damaged and has been discarded", stored.segment.path, stored.offset
        )
        segments.discard(stored.segment, stored.offset)
        with self._lock:
            self._unlearn(stored)

    # Writing

    def put_page(self, parent: bytes, key: bytes, block: bytes, position: int, content: Tensor) -> bool:
        """Store a page's bytes uint8 [page_bytes] soon. False when it is there, or there is no room to write it."""
        if self.has_page(key):
            return False
        header = Header(records.PAGE, key, parent, position, block, content.numel())
        return self._put(header, b"", content.numpy(), reserve=0.25)

    def put_point(
        self, key: bytes, tail: bytes, position: int, content: Tensor, hidden: Tensor | None, is_last: bool = False
    ) -> bool:
        """Store a window checkpoint behind the page of `key` soon; `is_last`: it ends an output."""
        if self.has_point(key, tail):
            return False
        extra = b"" if hidden is None else hidden.detach().float().cpu().numpy().tobytes()
        header = Header(records.POINT, key, key, position, tail, content.numel(), len(extra))
        return self._put(header, extra, content.numpy(), reserve=0.0 if is_last else 0.25)

    def flush(self) -> None:
        """Wait until everything put is written and on the disk itself."""
        self._queue.join()
        with self._lock:
            for segment in self._own.values():
                os.fdatasync(segment.fd)

    def close(self) -> None:
        """Write what is queued and close all files."""
        self._queue.put(None)
        self._writer.join()
        with self._lock:
            for segment in list(self._segments.values()):
                if segment.is_own and segment.fd >= 0:
                    segments.finish(segment)
                segment.close()
            self._segments.clear()
            self._pages.clear()
            self._points.clear()

    def _put(self, header: Header, hidden: bytes, content: NDArray[np.uint8], reserve: float) -> bool:
        if self._queued_bytes + header.nbytes > QUEUE_BYTES or not self._may_write(header.nbytes, reserve):
            self.stats.not_written += 1
            return False
        with self._lock:
            self._coming.add(_name(header))
            self._queued_bytes += header.nbytes
        self._queue.put((header, hidden, content))
        return True

    def _may_write(self, count: int, reserve: float) -> bool:
        """Take `count` from the write budget, which refills over an hour, unless less than `reserve` of it is left."""
        if self._per_hour is None:
            return True
        now = time.monotonic()
        gained = (now - self._refilled) / 3600 * self._per_hour
        self._allowance, self._refilled = min(float(self._per_hour), self._allowance + gained), now
        if self._allowance - count < reserve * self._per_hour:
            return False
        self._allowance -= count
        return True

    def _write_all(self) -> None:
        failed = 0
        while True:
            item = self._queue.get()
            if item is None:
                self._queue.task_done()
                return
            header, hidden, content = item
            try:
                self._write(header, hidden, content)
                if failed:
                    logger.info("the disk cache writes again; %d records are missing", failed)
                failed = 0
            except Exception as error:  # a full disk must not end the thread, nor fill itself with the log
                self.stats.not_written += 1
                if not failed:
                    logger.warning(
                        "the disk cache could not write %d bytes to %s (%s); answers do not suffer, and this is said "
                        "once until it can write again", header.nbytes, self.folder, error,
                    )  # fmt: skip
                failed += 1
            finally:
                with self._lock:
                    self._coming.discard(_name(header))
                    self._queued_bytes -= header.nbytes
                self._queue.task_done()

    def _write(self, header: Header, hidden: bytes, content: NDArray[np.uint8]) -> None:
        data = records.encode(header, hidden, content)
        self._make_room(len(data))
        segment = self._writable(".points" if header.kind == records.POINT else ".pages", len(data))
        offset = segments.append(segment, data)
        whole = records.decode(bytes(data[: records.HEADER]), header.tokens)
        assert whole is not None
        with self._lock:
            self._learn(Stored(segment, offset, whole))
        self.stats.bytes_written += len(data)
        self.stats.records_written += 1

    def _writable(self, suffix: str, count: int) -> Segment:
        """The segment of this process that takes the next record."""
        with self._lock:
            segment = self._own.get(suffix)
            if segment is None or segment.fd < 0 or segment.scanned + count > self.segment_bytes + segments.HEAD_BYTES:
                if segment is not None and segment.fd >= 0:
                    segments.finish(segment)
                self._number += 1
                segment = segments.create(self.folder, suffix, self.fingerprint, self._number)
                self._own[suffix] = self._segments[segment.path.name] = segment
            return segment

    # Room

    def _make_room(self, count: int) -> None:
        """Delete segments until `count` more bytes fit the budget; this process's current ones stay."""
        with self._lock:
            total, now = self.nbytes + count, time.time()
            if total <= self.budget:
                return

            def age(segment: Segment) -> float:
                return (now - segment.used) * (POINT_AGE if segment.is_points else 1.0)

            current = set(self._own.values())
            for segment in sorted(self._segments.values(), key=age, reverse=True):
                if total <= self.budget:
                    return
                size = segment.nbytes
                if segment not in current and segments.delete(segment):
                    self._forget(segment)
                    self.stats.segments_deleted += 1
                    total -= size

    def _learn(self, stored: Stored) -> None:
        header = stored.header
        if header.kind == records.PAGE:
            self._pages.setdefault(header.key, stored)
            self._children.setdefault(header.parent, set()).add(header.key)
        else:
            self._points.setdefault(header.key, {})[header.tokens] = stored
        stored.segment.records.append(header.key)

    def _unlearn(self, stored: Stored) -> None:
        header = stored.header
        if header.kind == records.PAGE:
            if self._pages.get(header.key) is stored:
                self._drop_page(header.key)
        elif self._points.get(header.key, {}).get(header.tokens) is stored:
            del self._points[header.key][header.tokens]

    def _drop_page(self, key: bytes) -> None:
        parent = self._pages.pop(key).header.parent
        self._children[parent].discard(key)
        if not self._children[parent]:
            del self._children[parent]

    def _forget(self, segment: Segment) -> None:
        for key in segment.records:
            page = self._pages.get(key)
            if page is not None and page.segment is segment:
                self._drop_page(key)
            for tail, point in list(self._points.get(key, {}).items()):
                if point.segment is segment:
                    del self._points[key][tail]
        self._segments.pop(segment.path.name, None)
        segment.close()


def _contents(rows: NDArray[np.uint8], header: Header) -> Tensor:
    return torch.from_numpy(rows[:, header.data_at : header.data_at + header.content_bytes])


def _name(header: Header) -> tuple[bytes, bytes | None]:
    return header.key, None if header.kind == records.PAGE else header.tokens
