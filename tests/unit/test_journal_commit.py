"""Group commit: nothing is acknowledged before its sync returned (L4), failed syncs (L5), full disks (L6)."""

import asyncio
import errno
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
from journal_disks import Gate, HookedDisk, QuietDisk, some_records

from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, Reader, Record, Tokens, ToolResult
from rorqual.journal.disk import Disk
from rorqual.journal.reading import replay_folder


def token(position: int) -> Tokens:
    return Tokens(1, position, 0, (position,), (-0.5,))


def in_thread(function: object, *arguments: object) -> tuple[threading.Thread, list[object]]:
    """A started thread and the list that gets its result or error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function(*arguments))  # type: ignore[operator]
        except JournalError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def records_of(folder: Path) -> list[Record]:
    with Journal(folder, disk=QuietDisk()) as journal:
        return [record for _, record in journal.replay()]


@pytest.mark.parametrize("gate_at", ["before", "after"])
def test_l4_group_commit_never_acknowledges_before_the_sync_returns(tmp_path: Path, gate_at: str) -> None:
    disk, gate = HookedDisk(), Gate()
    journal, reader = Journal(tmp_path / "j", disk=disk), Reader(tmp_path / "j")
    journal.append(token(0))
    assert journal.commit() == 1
    setattr(disk, gate_at, gate)
    journal.append(token(1))
    thread, results = in_thread(journal.commit)
    assert gate.reached.wait(10)
    thread.join(0.05)
    assert thread.is_alive() and not results
    assert journal.durable_lsn == 1
    assert [lsn for lsn, _ in reader.poll()] == [1], "a reader sees what is durable and no more"
    gate.open()
    thread.join(10)
    assert results == [2] and journal.durable_lsn == 2
    assert [lsn for lsn, _ in reader.poll()] == [2]
    journal.close()


def test_l4_callers_share_one_sync(tmp_path: Path) -> None:
    """Whatever was appended while a sync ran is made durable by the next one, for all that wait for it."""
    disk, gate = HookedDisk(), Gate()
    journal = Journal(tmp_path / "j", disk=disk)
    disk.after = gate
    journal.append(token(0))
    first, _ = in_thread(journal.commit)
    assert gate.reached.wait(10)
    disk.after = lambda _: None

    def append_and_commit(position: int) -> int:
        lsn = journal.append(token(position))
        durable = journal.commit()
        assert durable >= lsn
        return durable

    others = [in_thread(append_and_commit, position) for position in range(1, 17)]
    while journal.last_lsn < 17:
        pass
    assert journal.durable_lsn == 0
    gate.open()
    for thread, _ in [(first, None), *others]:
        thread.join(10)
    assert [results for _, results in others] == [[17]] * 16
    assert disk.num_synced == 2
    journal.close()
    assert len(records_of(tmp_path / "j")) == 17


def test_a_commit_answers_for_what_was_appended_before_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        for position in range(100):
            lsn = journal.append(token(position))
            assert lsn == position + 1 == journal.last_lsn
            if position % 7 == 0:
                assert journal.commit() == lsn == journal.durable_lsn
        assert journal.commit() == 100


def test_waiters_in_an_event_loop_share_syncs_and_do_not_block_it(tmp_path: Path) -> None:
    disk, gate = HookedDisk(), Gate()
    journal = Journal(tmp_path / "j", disk=disk)

    async def append_and_commit(position: int) -> tuple[int, int]:
        return journal.append(token(position)), await journal.acommit()

    async def run() -> list[tuple[int, int]]:
        disk.after = gate
        first = asyncio.create_task(append_and_commit(0))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)  # the loop runs on while the sync does
        disk.after = lambda _: None
        others = [asyncio.create_task(append_and_commit(position)) for position in range(1, 33)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in [first, *others])
        gate.open()
        return await asyncio.gather(first, *others)

    done = asyncio.run(run())
    assert all(durable >= lsn for lsn, durable in done)
    assert disk.num_synced <= 3
    journal.close()


def test_a_cancelled_waiter_takes_nobody_along(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", disk=QuietDisk())

    async def run() -> int:
        journal.append(token(0))
        task = asyncio.create_task(journal.acommit())
        await asyncio.sleep(0)
        task.cancel()
        journal.append(token(1))
        return await journal.acommit()

    assert asyncio.run(run()) == 2
    journal.close()


def test_commit_soon_does_not_wait_and_tells_of_a_failure(tmp_path: Path) -> None:
    disk, gate = HookedDisk(), Gate()
    journal = Journal(tmp_path / "j", disk=disk)
    disk.before = gate
    journal.append(token(0))
    journal.commit_soon()
    assert gate.reached.wait(10) and journal.durable_lsn == 0
    disk.before = no_room
    journal.append(token(1))
    journal.commit_soon()
    gate.open()
    for _ in range(1000):
        try:
            journal.commit_soon()
        except JournalError as error:
            assert error.retryable
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("the failure was never told")
    disk.before = lambda _: None
    journal.close()
    assert records_of(tmp_path / "j") == [token(0), token(1)]


def no_room(_: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(_: bytes) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("hook", ["before", "after"])
def test_l5_a_failing_sync_poisons(tmp_path: Path, hook: str) -> None:
    disk = HookedDisk()
    journal = Journal(tmp_path / "j", disk=disk)
    journal.append(token(0))
    journal.commit()
    journal.append(token(1))
    setattr(disk, hook, broken)
    with pytest.raises(
        JournalError, match=r"failed to write or sync: Input/output error. Records to LSN 1 are durable"
    ):
        journal.commit()
    assert journal.durable_lsn == 1
    setattr(disk, hook, lambda _: None)
    synced = disk.num_synced
    for call in (journal.commit, lambda: journal.append(token(2)), lambda: journal.append_many([token(2)])):
        with pytest.raises(JournalError, match="this writer has ended"):
            call()
    with pytest.raises(JournalError, match="this writer has ended"):
        asyncio.run(journal.acommit())
    journal.close()
    assert disk.num_synced == synced, "a sync that failed is never tried again"
    assert records_of(tmp_path / "j")[:1] == [token(0)]


def test_l5_what_was_in_doubt_is_written_again_before_it_counts(tmp_path: Path) -> None:
    """After a failed sync a system may hold pages for clean that never reached the disk; a second sync lies then."""
    disk = HookedDisk()
    journal = Journal(tmp_path / "j", disk=disk)
    journal.append(token(0))
    journal.commit()
    journal.append(token(1))
    disk.after = broken
    with pytest.raises(JournalError):
        journal.commit()
    journal.close()

    class Watch(QuietDisk):
        calls: list[tuple[str, bytes]] = []

        def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
            self.calls.append(("write", data))
            super().write(descriptor, data, offset, synced=synced)

        def sync(self, descriptor: int) -> None:
            self.calls.append(("sync", b""))

    with Journal(tmp_path / "j", disk=Watch()) as again:
        (kind, data), *rest = Watch.calls
        assert kind == "write" and data in (next((tmp_path / "j").glob("*.seg"))).read_bytes() and len(data) == 52
        assert ("sync", b"") in rest
        assert [record for _, record in again.replay()] == [token(0), token(1)]


def test_l6_disk_full_keeps_a_durable_prefix_and_what_waits(tmp_path: Path) -> None:
    disk = HookedDisk()
    journal = Journal(tmp_path / "j", disk=disk)
    records = some_records(60)
    journal.append_many(records[:20])
    journal.commit()
    journal.append_many(records[20:40])
    disk.before = no_room
    for _ in range(2):
        with pytest.raises(JournalError, match="No space left on device. Records to LSN 20 are durable, 20 wait") as it:
            journal.commit()
        assert it.value.retryable and journal.durable_lsn == 20
    assert [record for _, record in journal.replay()] == records[:20]
    journal.append_many(records[40:])
    disk.before = lambda _: None
    assert journal.commit() == 60
    journal.close()
    assert records_of(tmp_path / "j") == records


def test_l6_disk_full_within_a_write_by_the_system_itself(tmp_path: Path) -> None:
    """The limit of a file's size stands in for the disk's end: the system writes up to it and then refuses."""
    records: list[Record] = [Event("OUTPUT", {"text": bytes([n]) * 3000}) for n in range(1, 60)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    journal, acknowledged = Journal(tmp_path / "j", disk=Disk()), 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, before[1]))
        with pytest.raises(JournalError, match="File too large"):
            for record in records:
                journal.append(record)
                acknowledged = journal.commit()
        last = journal.last_lsn
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert 20 < acknowledged == journal.durable_lsn == last - 1
        assert [record for _, record in journal.replay()] == records[:acknowledged]
        assert journal.commit() == last, "with room it goes on"
        journal.append_many(records[last:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        journal.close()
    assert records_of(tmp_path / "j") == records


def test_l6_a_close_that_cannot_commit_says_so_and_lets_go(tmp_path: Path) -> None:
    disk = HookedDisk()
    journal = Journal(tmp_path / "j", disk=disk)
    journal.append(token(0))
    journal.commit()
    journal.append(token(1))
    disk.before = no_room
    with pytest.raises(JournalError, match="No space left"):
        journal.close()
    journal.close()
    assert records_of(tmp_path / "j") == [token(0)]


def test_a_refused_record_leaves_no_trace(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        journal.append(token(0))
        for wrong, said in (
            (Event("x", {"what": object()}), "cannot be stored: can not serialize 'object' object"),
            (Event("x", {"big": 2**70}), "cannot be stored"),
            (Tokens(1, 0, 0, ()), "it has 0 ids, and a record holds 1 to 65535"),
            (Tokens(1, 0, 0, (1, 2), (-1.0,)), "1 log-probabilities for 2 ids"),
            (Tokens(1, -1, 0, (1,)), "a Tokens record of request 1 cannot be stored"),
            (Tokens(1, 0, 0, (2**32,)), "Positions, versions and ids are 32 bits"),
            (ToolResult(1, 0, b"short"), "ToolResult.key is b'short'. It must be 16 bytes."),
            (ToolResult(-1, 0, bytes(16)), "ToolResult.request is -1"),
            (ToolResult(1, 0, bytes(16), output=bytes(40_000)), "40,000 bytes, more than the 32,768"),
            ("text", "str is no record of the journal. Use one of Request, Tokens"),
        ):
            with pytest.raises(JournalError, match=said):
                journal.append(wrong)  # type: ignore[arg-type]
            with pytest.raises(JournalError, match=said):
                journal.append_many([token(1), wrong])  # type: ignore[list-item]
        assert journal.append(token(1)) == 2
        journal.commit()
        assert [record for _, record in journal.replay()] == [token(0), token(1)]


def test_replay_from_an_lsn_over_several_segments(tmp_path: Path) -> None:
    records = some_records(150)
    with Journal(tmp_path / "j", segment_bytes=2000, disk=QuietDisk()) as journal:
        for start in range(0, 150, 10):
            journal.append_many(records[start : start + 10])
            journal.commit()
        for since in (0, 1, 17, 75, 149, 150, 400):
            assert list(journal.replay(since)) == list(enumerate(records, 1))[since:]
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        for since in (0, 1, 17, 149, 150):
            assert list(journal.replay(since)) == list(enumerate(records, 1))[since:]


def test_opening_again_and_again_changes_no_record_and_leaves_no_file(tmp_path: Path) -> None:
    records = some_records(30)
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        journal.append_many(records)
    before = {path.name: path.read_bytes() for path in (tmp_path / "j").glob("*.seg")}
    for _ in range(20):
        assert records_of(tmp_path / "j") == records
    assert {path.name: path.read_bytes() for path in (tmp_path / "j").glob("*.seg")} == before


def test_without_sync_it_survives_the_process(tmp_path: Path) -> None:
    disk = HookedDisk()
    with Journal(tmp_path / "j", sync=False, disk=disk) as journal:
        journal.append(token(0))
        assert journal.commit() == 1
    assert disk.num_synced == 0
    assert records_of(tmp_path / "j") == [token(0)]


@pytest.mark.parametrize("had_thread", [True, False])
def test_a_closed_journal_says_so(tmp_path: Path, had_thread: bool) -> None:
    journal = Journal(tmp_path / "j", disk=QuietDisk())
    if had_thread:
        journal.append(token(0))
        journal.commit_soon()
    journal.close()
    waited = lambda: asyncio.run(journal.acommit())  # noqa: E731
    for call in (journal.commit, lambda: journal.append(token(0)), journal.commit_soon, waited):
        with pytest.raises(JournalError, match="is closed. Open it anew"):
            call()


def test_commit_soon_waits_for_enough_records(tmp_path: Path) -> None:
    disk = HookedDisk()
    with Journal(tmp_path / "j", disk=disk) as journal:
        for position in range(15):
            journal.append(token(position))
            journal.commit_soon(at_least=16)
        assert journal._committer is None
        journal.append(token(15))
        journal.commit_soon(at_least=16)
        assert asyncio.run(journal.acommit()) == 16
    assert disk.num_synced in (1, 2)


def test_a_folder_that_cannot_be_a_journal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be opened for writing: "):
        Journal(tmp_path / "file")
    with pytest.raises(JournalError, match="cannot be read as a journal: No such file"):
        Reader(tmp_path / "nothing")


def test_a_closed_journal_still_replays_what_it_wrote(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", disk=QuietDisk())
    journal.append(token(0))
    journal.commit()
    journal.close()
    assert [record for _, record in journal.replay()] == [token(0)]


def test_reading_a_journal_that_is_being_written_finds_no_damage(tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> int:
        with Journal(tmp_path / "j", disk=QuietDisk(), segment_bytes=1 << 20) as journal:
            position = 0
            while not stop.is_set() and position < 100_000:
                journal.append(token(position))
                journal.commit()
                position += 1
        return position

    thread, results = in_thread(write)
    seen = 0
    try:
        while not (tmp_path / "j" / "state").exists():
            thread.join(0.01)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            numbers = [lsn for lsn, _ in replay_folder(tmp_path / "j")]
            assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= seen
            seen = len(numbers)
    finally:
        stop.set()
        thread.join()
    assert seen > 0 and len(records_of(tmp_path / "j")) == results[0]
