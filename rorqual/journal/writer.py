"""`Journal`: append, group commit, replay.

`append` gives a record its number (LSN) and holds its bytes in memory. `commit` returns once everything appended before
the call is durable. Whoever commits takes along all that was queued while the sync before ran, so callers share syncs
and nobody waits for a timer. A record is acknowledged by `commit`'s return, never before.

What can go wrong: a full disk refuses the commit and keeps the records for another attempt; any other failed write or
sync ends this writer for good, since what a system says about the same data afterwards cannot be trusted.
"""

import os
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual import log
from rorqual.errors import JournalError
from rorqual.journal import frames
from rorqual.journal.columns import num_records
from rorqual.journal.committer import Committer
from rorqual.journal.disk import FULL_ERRORS, Disk
from rorqual.journal.ownership import Guard, Ownership
from rorqual.journal.pending import Pending
from rorqual.journal.reading import read_records
from rorqual.journal.records import Record, encode
from rorqual.journal.recovery import Recovered, recover
from rorqual.journal.segments import Bytes, Segment, file_name, list_segments
from rorqual.journal.state import State
from rorqual.journal.tokens import UNFIT, unfit

_LEAST_ROOM, _MOST_ROOM = 64 << 10, 1 << 20
"""Zeros written ahead in a segment's file, in bytes; they double from the least to the most."""

_log = log.get(__name__)


@dataclass(slots=True)
class _Batch:
    """What one commit writes."""

    data: bytes
    last_lsn: int


class Journal:
    """The one writer of a journal. Threads may share it; see `Reader` for reading beside it.

    path: a folder, made if needed. segment_bytes: a new file is begun once one has this size. sync=False: commits
    survive the process but not the machine. take_over: fence a writer that holds the journal and hangs.
    Raises: JournalError when another process writes it, or when committed records are damaged.

    >>> with Journal(folder) as journal:
    ...     journal.append(Tokens(request=1, first_position=0, policy_version=0, ids=(17,), logprobs=(-0.5,)))
    ...     journal.commit()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        segment_bytes: int = 64 << 20,
        sync: bool = True,
        take_over: bool = False,
        disk: Disk | None = None,
    ) -> None:
        self.path = Path(path)
        self.recovered: Recovered | None = None
        """What was kept of the last segment; None when the journal is new."""
        self._segment_bytes, self._sync, self._disk = segment_bytes, sync, disk or Disk()
        self._lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._unwritten: _Batch | None = None
        self._broken: str | None = None
        self._file, self._offset, self._room = -1, 0, 0
        self._first_lsn = 0
        self._committer: Committer | None = None
        self._pid, self._is_closed = os.getpid(), False
        self._open(take_over)

    # Opening

    def _open(self, take_over: bool) -> None:
        try:
            _make_folder(self.path, self._disk)
            with Guard(self.path):
                self._owner = Ownership(self.path, take_over=take_over)
                try:
                    self._recover(take_over)
                except BaseException:
                    self._owner.release()
                    raise
        except OSError as error:
            raise JournalError(
                f"the journal {self.path} cannot be opened for writing: {error.strerror or error}. Check that the "
                f"folder is yours and its disk has room."
            ) from None

    def _recover(self, take_over: bool) -> None:
        listing = list_segments(self.path)
        state = State.load(self.path, writable=True, disk=self._disk)
        segments = listing.segments
        had = max([state.epoch if state is not None else 0, *(segment.epoch for segment in segments)])
        self.epoch = had + 1
        if state is not None:
            state.set_epoch(self.epoch)  # from here on an older writer acknowledges nothing
        worker = state.worker if state is not None else self._worker(segments)
        next_lsn = 1
        if segments:
            self.recovered = self._keep(segments[-1], state)
            next_lsn = self.recovered.next_lsn
        self._warn_of_missing(state, next_lsn)
        for path in [*listing.stale, *self.path.glob("*.tmp")]:
            self._disk.unlink(path)
        if state is None:
            state = State.create(self.path, worker, self.epoch, self._disk)
        self._state, self._durable = state, next_lsn - 1
        self._seed = frames.crc_seed(state.worker, self.epoch)
        self._pending = Pending(next_lsn, self._seed, frames.FIRST_OF_COMMIT if self._sync else 0)
        if take_over:
            self._begin_segment(next_lsn)

    def _keep(self, segment: Segment, state: State | None) -> Recovered:
        """Cut the torn tail of the last segment, and make sure that what is kept is on the disk."""
        if segment.is_columnar:  # the empty one behind it was removed at an opening
            return Recovered(segment.path.stat().st_size, segment.first_lsn + num_records(segment), 0, 0)
        mark = None if state is None else state.mark_of(segment.epoch, segment.first_lsn)
        with Bytes(segment.path) as file:
            kept = recover(file.data, segment, mark, has_state=state is not None, from_mark=True)
            start = min(mark.offset if mark is not None else 0, kept.end)
            # Records whose sync never returned, or failed, are perhaps only in the system's memory, and it may believe
            # that it wrote them: written again, they are what the next sync is about.
            unsure, size = bytes(file.data[start : kept.end]), file.size
        if unsure or size > kept.end:
            descriptor = self._disk.open(segment.path)
            try:
                if unsure:
                    self._disk.write(descriptor, unsure, start, synced=False)
                if size > kept.end:
                    self._disk.truncate(descriptor, kept.end)
                self._disk.sync(descriptor)
            finally:
                self._disk.close(descriptor)
        if kept.end <= frames.FILE_HEADER_BYTES:
            self._disk.unlink(segment.path)
            self._disk.sync_folder(self.path)
        elif state is not None:
            for _ in range(2):  # both places: readers see what was kept, and no longer what was cut
                state.set_mark(segment.epoch, segment.first_lsn, kept.end, kept.next_lsn - 1)
        return kept

    def _warn_of_missing(self, state: State | None, next_lsn: int) -> None:
        acknowledged = state.acknowledged() if state is not None else 0
        missing = max(acknowledged - next_lsn + 1, self.recovered.missing if self.recovered else 0)
        if missing > 0:
            _log.warning("%s was cut: %d acknowledged records from LSN %d on are gone", self.path, missing, next_lsn)

    @staticmethod
    def _worker(segments: list[Segment]) -> bytes:
        for segment in segments:
            with Bytes(segment.path) as file:
                if file.size >= frames.FILE_HEADER_BYTES and not segment.is_columnar:
                    return frames.decode_file_header(file.data, segment.name).worker
        return uuid.uuid4().bytes

    # Appending

    @property
    def durable_lsn(self) -> int:
        """LSN of the last record that is durable; 0 when there is none."""
        return self._durable

    @property
    def last_lsn(self) -> int:
        """LSN of the last record that was appended, durable or not."""
        return self._pending.next_lsn - 1

    def append(self, record: Record) -> int:
        """Queue a record for the next commit and return its LSN.

        Raises: JournalError when the record cannot be stored (nothing is queued then) or the writer has ended.
        """
        payload = encode(record)
        with self._lock:
            if self._broken is not None:
                raise JournalError(self._broken)
            return self._pending.add(payload, record.TYPE)

    def append_many(self, records: Iterable[Record]) -> int:
        """Queue records one behind the other, all or none; returns the LSN of the last.

        Raises: JournalError, like `append`.
        """
        entries = [(encode(record), record.TYPE) for record in records]
        with self._lock:
            if self._broken is not None:
                raise JournalError(self._broken)
            return self._pending.add_many(entries)

    def append_token(self, request: int, position: int, policy_version: int, token: int, logprob: float) -> int:
        """Queue one token of a stream, in as little time as can be; returns the LSN of its `Tokens` record.

        Tokens of a request at positions that follow each other share a record until it is committed or another call
        appends something, so two of them may have one LSN.
        Raises: JournalError, like `append`.
        """
        with self._lock:
            if self._broken is not None:
                raise JournalError(self._broken)
            try:
                return self._pending.add_token(request, position, policy_version, token, logprob)
            except UNFIT as error:
                raise unfit(request, error) from None

    # Committing

    def commit(self) -> int:
        """Return once all that was appended before the call is durable; the durable LSN, which may be further.

        Raises: JournalError. After one that is `retryable` (a full disk) the records are still queued and another
        commit tries again; after any other this writer has ended and the journal must be opened anew.
        """
        target = self.last_lsn
        if self._durable < target:
            with self._commit_lock:
                while self._durable < target:
                    self._write(self._unwritten or self._take())
        elif self._broken is not None:
            raise JournalError(self._broken)
        return self._durable

    def commit_soon(self, at_least: int | None = None, within_s: float | None = None) -> None:
        """Have all that was appended committed by a thread, and do not wait; `durable_lsn` says when it is done.

        With neither argument the commit begins at once. Each sync costs what tens of records cost, so a decoder with
        few streams gathers: at_least: begin once so many records wait. within_s: begin within so many seconds of this
        call, however few wait. With both, whichever comes first; with `at_least` alone the last few wait for `commit`.
        Raises: JournalError when the newest such commit failed; what is queued is tried again nevertheless.
        """
        if at_least is None:
            at_least = 1 if within_s is None else sys.maxsize
        waiting = self._pending.next_lsn - 1 - self._durable
        is_enough = waiting >= at_least
        if not is_enough and (within_s is None or not waiting) and self._broken is None and not self._is_closed:
            return
        committer = self._own_committer()
        if is_enough:
            committer.ask()
        elif within_s is not None:
            committer.ask_within(within_s)
        if committer.failure is not None:
            raise committer.failure

    async def acommit(self) -> int:
        """`commit` for an event loop: many waiters share one sync and none of them blocks the loop."""
        return await self._own_committer().wait()

    def _own_committer(self) -> Committer:
        with self._lock:
            if self._broken is not None or self._is_closed:
                raise JournalError(self._broken or f"the journal {self.path} is closed. Open it anew to append.")
            if self._committer is None or os.getpid() != self._pid:
                self._check_owner()  # a child has no thread that would answer
                self._committer = Committer(self.commit, lambda: self._durable < self.last_lsn, str(self.path))
            return self._committer

    def _take(self) -> _Batch:
        """Everything queued, as one batch. What is appended from now on belongs to the next one."""
        with self._lock:
            entries, last = self._pending.take()
        self._unwritten = _Batch(self._pending.frame(entries, last), last)
        return self._unwritten

    def _write(self, batch: _Batch) -> None:
        """Make a batch durable, then say so."""
        if self._broken is not None:
            raise JournalError(self._broken)
        self._check_owner()
        try:
            if self._file < 0 or (
                self._offset + len(batch.data) > self._segment_bytes and self._offset > frames.FILE_HEADER_BYTES
            ):
                self._begin_segment(self._durable + 1)
            if self._offset + len(batch.data) > self._room and self._sync:
                self._make_room(self._offset + len(batch.data))
            self._disk.write(self._file, batch.data, self._offset, synced=self._sync)
        except OSError as error:
            raise self._failed(error) from error
        self._check_owner()  # an older writer that wakes up here acknowledges nothing
        self._offset += len(batch.data)
        self._room = max(self._room, self._offset)  # a batch may be longer than its room, when there was no more
        self._unwritten = None
        self._state.set_mark(self.epoch, self._first_lsn, self._offset, batch.last_lsn)
        self._durable = batch.last_lsn

    def _check_owner(self) -> None:
        self._broken = self._no_owner()
        if self._broken is not None:
            raise JournalError(self._broken)

    def _no_owner(self) -> str | None:
        """Why this is not the journal's writer any more; None while it is."""
        if self._state.epoch != self.epoch:
            return (
                f"the journal {self.path} was taken over by another writer (epoch {self._state.epoch}; this one's is "
                f"{self.epoch}). Nothing more is written here: stop this owner, its successor goes on."
            )
        if os.getpid() != self._pid:
            return (
                f"the journal {self.path} was opened by process {self._pid} and this is its child {os.getpid()}. A "
                f"journal has one writer: append in the process that opened it."
            )
        return None

    def _failed(self, error: OSError) -> JournalError:
        what = error.strerror or str(error)
        if error.errno in FULL_ERRORS:
            return JournalError(
                f"the journal {self.path} cannot write: {what}. Records to LSN {self._durable} are durable, "
                f"{self.last_lsn - self._durable} wait in memory. Make room and commit again, or close.",
                retryable=True,
            )
        self._broken = (
            f"the journal {self.path} failed to write or sync: {what}. Records to LSN {self._durable} are durable; "
            f"those behind it are in doubt, so this writer has ended. Check the disk, then open the journal anew."
        )
        return JournalError(self._broken)

    def _make_room(self, need: int) -> None:
        room = need + min(max(self._room, _LEAST_ROOM), _MOST_ROOM)
        try:
            self._disk.make_room(self._file, self._room, room - self._room)
            self._room = room
        except OSError as error:
            if error.errno not in FULL_ERRORS:  # the last bytes of a disk are used too, by the batch itself
                raise

    def _begin_segment(self, first_lsn: int) -> None:
        """Seal the present file and make the next; both durable, with their names."""
        if self._file >= 0:
            self._seal()
        path = self.path / file_name(first_lsn, self.epoch)
        flags = 0 if self._sync else frames.UNSYNCED
        header = frames.FileHeader(self._state.worker, self.epoch, first_lsn, time.time_ns(), flags).encode()
        new = path.with_suffix(".tmp")
        self._disk.unlink(new)
        descriptor = self._disk.create(new)
        try:
            self._disk.write(descriptor, header, 0, synced=True)
            self._disk.rename(new, path)
            self._disk.sync_folder(self.path)
        except OSError:
            self._disk.close(descriptor)
            self._disk.unlink(new)
            raise
        self._file, self._offset, self._room, self._first_lsn = descriptor, len(header), len(header), first_lsn

    def _seal(self) -> None:
        """Give back the room behind the last record and close the file."""
        descriptor, self._file = self._file, -1
        try:
            self._disk.truncate(descriptor, self._offset)
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)

    # Reading and closing

    def replay(self, since: int = 0) -> Iterator[tuple[int, Record]]:
        """The durable records with LSN > `since`, in order, as (LSN, record).

        Raises: JournalError with segment and offset at the first damage; the records before it have been given.
        """
        with self._commit_lock:
            current = (self._first_lsn, self.epoch) if self._file >= 0 else None
            end, segments, behind = self._offset, list_segments(self.path).segments, self._durable + 1
        for segment in segments:
            if (segment.first_lsn, segment.epoch) == current:
                yield from read_records(segment, since, end)
                return
            stop_lsn = segment.stop_lsn or behind
            if stop_lsn - 1 > since:
                yield from read_records(replace(segment, stop_lsn=stop_lsn), since)

    def close(self) -> None:
        """Commit what is queued, seal the file and let others write. A second call does nothing.

        Raises: JournalError when queued records cannot be made durable; the journal is closed nevertheless.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._committer is not None:
            self._committer.stop()
        try:
            if self._broken is None:
                self.commit()
                with self._commit_lock:
                    if self._file >= 0 and self._no_owner() is None:
                        self._seal()
                    self._state.sync()
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._let_go()

    def discard(self) -> None:
        """Let go without committing or sealing: for a journal whose folder is about to be removed."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._committer is not None:
            self._committer.stop()
        self._let_go()

    def _let_go(self) -> None:
        with self._commit_lock:
            self._broken = self._broken or f"the journal {self.path} is closed. Open it anew to append."
            if self._file >= 0:
                self._disk.close(self._file)
                self._file = -1
            self._state.close()
            self._owner.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_folder(path: Path, disk: Disk) -> None:
    """A folder whose name is durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        disk.sync_folder(folder.parent)
