"""One writer a journal: locks, taking over, fencing (K6), kill -9 with what was acknowledged."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import journal_process
import pytest
from full import often
from journal_disks import Gate, HookedDisk, QuietDisk
from journal_process import record_of

from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, Reader, Tokens, frames, replay_folder, verify
from rorqual.journal.records import encode
from rorqual.journal.segments import list_segments

PROGRAM = journal_process.__file__


@contextmanager
def writer(folder: Path, segment_bytes: int = 64 << 20) -> Iterator[subprocess.Popen[str]]:
    """A process that writes the journal; killed at the end if it lives."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, str(folder), str(segment_bytes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def acknowledged_by(process: subprocess.Popen[str]) -> int:
    """The last LSN it printed; call once it has ended."""
    assert process.stdout is not None
    lines = [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    return int(lines[-1]) if lines else 0


def first_line(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def kill_rounds(folder: Path, rounds: int) -> None:
    """Kill a writer at random moments, again and again over one journal; nothing acknowledged may be lost."""
    random, acknowledged = Random(3), 0
    for _ in range(rounds):
        with writer(folder, segment_bytes=100_000) as process:
            began = first_line(process)
            assert began > acknowledged
            time.sleep(random.random() * 0.06)
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            acknowledged = max(acknowledged, began, acknowledged_by(process))
        assert verify(folder).ok
        with Journal(folder, disk=QuietDisk()) as journal:
            found = list(journal.replay())
            assert journal.durable_lsn == len(found) >= acknowledged
        assert found == [(lsn, record_of(lsn)) for lsn in range(1, len(found) + 1)]


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    kill_rounds(tmp_path / "j", 3)


@pytest.mark.slow
def test_kill_9_loses_nothing_acknowledged_in_many_rounds(tmp_path: Path) -> None:
    kill_rounds(tmp_path / "j", often(20, 300))


def test_a_second_writer_is_refused_with_the_first_ones_process(tmp_path: Path) -> None:
    with writer(tmp_path / "j") as process:
        first_line(process)
        with pytest.raises(JournalError, match=f"is being written by process {process.pid}"):
            Journal(tmp_path / "j")
        assert first_line(process) > 0, "the first one goes on"
    Journal(tmp_path / "j").close()


def test_k6_a_stopped_writer_that_wakes_writes_nothing(tmp_path: Path) -> None:
    folder, random = tmp_path / "j", Random(1)
    for turn in range(often(4, 40)):
        with writer(folder, segment_bytes=200_000) as process:
            first_line(process)
            time.sleep(random.random() * 0.03)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            successor = Journal(folder, take_over=True)
            kept = successor.durable_lsn
            if turn % 2:
                while successor.last_lsn < kept + 20:
                    successor.append(record_of(successor.last_lsn + 1))
                successor.commit()
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate(timeout=20)
            assert process.returncode == 3 and "was taken over by another writer" in said
            last = successor.durable_lsn
            assert [lsn for lsn, _ in successor.replay(kept)] == list(range(kept + 1, last + 1))
            successor.close()
        with Journal(folder, disk=QuietDisk()) as journal:
            found = list(journal.replay())
        assert found == [(lsn, record_of(lsn)) for lsn in range(1, last + 1)]


@pytest.mark.parametrize("hook", ["before", "after"])
def test_k6_a_batch_in_flight_when_the_journal_is_taken_over(tmp_path: Path, hook: str) -> None:
    """Woken between its check and its write, the older one does write, where nobody reads; it acknowledges nothing."""
    disk, gate = HookedDisk(), Gate()
    old = Journal(tmp_path / "j", disk=disk)
    old.append(Event("old", {"n": 0}))
    assert old.commit() == 1
    old.append(Event("old", {"n": 1}))
    setattr(disk, hook, gate)
    results: list[object] = []

    def commit() -> None:
        try:
            results.append(old.commit())
        except JournalError as error:
            results.append(error)

    thread = threading.Thread(target=commit)
    thread.start()
    assert gate.reached.wait(10)
    new = Journal(tmp_path / "j", take_over=True, disk=QuietDisk())
    kept = new.durable_lsn
    assert kept == (1 if hook == "before" else 2), "what was written by then is kept"
    gate.open()
    thread.join(10)
    assert isinstance(results[0], JournalError) and "was taken over by another writer (epoch 2" in str(results[0])
    with pytest.raises(JournalError, match="stop this owner"):
        old.append(Event("old"))
    assert new.append(Event("new")) == kept + 1
    new.commit()
    for records in (list(new.replay()), list(Reader(tmp_path / "j").poll())):
        assert [record.kind for _, record in records if isinstance(record, Event)] == ["old"] * kept + ["new"]
    old.close()
    new.close()
    assert verify(tmp_path / "j").ok
    with Journal(tmp_path / "j", disk=QuietDisk()) as again:
        assert again.durable_lsn == kept + 1


def test_k6_a_writer_that_wakes_before_its_commit_does_not_touch_the_disk(tmp_path: Path) -> None:
    disk = HookedDisk()
    old = Journal(tmp_path / "j", disk=disk)
    old.append(Event("old"))
    old.commit()
    old.append(Event("late"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "j").glob("*.seg")}
    with Journal(tmp_path / "j", take_over=True, disk=QuietDisk()) as new:
        with pytest.raises(JournalError, match="was taken over"):
            old.commit()
        assert disk.num_synced == 1
        kept = {name: (tmp_path / "j" / name).read_bytes() for name in before}
        assert all(before[name].startswith(data) for name, data in kept.items())
        assert new.durable_lsn == 1
    old.close()


@pytest.mark.parametrize("first_lsn", [4, 9])
def test_a_segment_that_a_fenced_writer_still_makes_counts_for_nothing(tmp_path: Path, first_lsn: int) -> None:
    old = Journal(tmp_path / "j", disk=QuietDisk())
    for n in range(3):
        old.append(Event("old", {"n": n}))
        old.commit()
    new = Journal(tmp_path / "j", take_over=True, disk=QuietDisk())
    new.append(Event("new"))
    new.commit()
    old._begin_segment(first_lsn)  # stopped between its check and here
    old._disk.write(old._file, b"whatever", 64, synced=False)
    assert [segment.epoch for segment in list_segments(tmp_path / "j").segments] == [1, 2]
    assert [lsn for lsn, _ in new.replay()] == [1, 2, 3, 4]
    old.close()
    new.close()
    assert verify(tmp_path / "j").stale == [f"{first_lsn:020d}-0000000001.seg"]
    with Journal(tmp_path / "j", disk=QuietDisk()) as again:
        assert [lsn for lsn, _ in again.replay()] == [1, 2, 3, 4]
    assert verify(tmp_path / "j").stale == []


def test_nor_does_one_made_before_the_successor_wrote_anything(tmp_path: Path) -> None:
    old = Journal(tmp_path / "j", disk=QuietDisk())
    for n in range(3):
        old.append(Event("old", {"n": n}))
    old.commit()
    new = Journal(tmp_path / "j", take_over=True, disk=QuietDisk())
    old._begin_segment(4)
    late = frames.encode_frame(Event.TYPE, frames.FIRST_OF_COMMIT, 4, encode(Event("late")), old._seed)
    old._disk.write(old._file, late, 64, synced=False)
    assert len(list(replay_folder(tmp_path / "j"))) == 3
    new.close()
    old.close()
    with Journal(tmp_path / "j", disk=QuietDisk()) as again:
        assert again.durable_lsn == 3 == len(list(again.replay()))


def test_a_child_process_may_not_write_its_parents_journal(tmp_path: Path) -> None:
    """Nor seal its file by closing it."""
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        journal.append(Event("parent"))
        journal.commit()
        (segment,) = (tmp_path / "j").glob("*.seg")
        size = segment.stat().st_size
        for has_record in (False, True):
            child = os.fork()
            if not child:
                code = 0 if has_record else 7
                try:
                    if has_record:
                        journal.append(Event("child"))
                        journal.commit()
                    journal.close()
                except JournalError as error:
                    code = 7 if "append in the process that opened it" in str(error) else 1
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert segment.stat().st_size == size
        with pytest.raises(JournalError, match="is being written by process"):
            Journal(tmp_path / "j")
        journal.append(Event("parent"))
        assert journal.commit() == 2


def test_threads_append_and_commit_side_by_side(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", segment_bytes=20_000, disk=QuietDisk()) as journal:

        def run(request: int) -> None:
            for position in range(100):
                lsn = journal.append(Tokens(request, position, 0, (position,), (-1.0,)))
                if position % 3 == 0:
                    assert journal.commit() >= lsn

        threads = [threading.Thread(target=run, args=(request,)) for request in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        journal.commit()
        found = list(journal.replay())
    assert [lsn for lsn, _ in found] == list(range(1, 801))
    for request in range(8):
        mine = [r.first_position for _, r in found if isinstance(r, Tokens) and r.request == request]
        assert mine == list(range(100)), "each thread's records are in its order"
