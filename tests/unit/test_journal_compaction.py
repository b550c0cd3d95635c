"""Compaction (L8), reading beside a writer, and journals of ten million tokens (L7)."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from full import often
from journal_disks import QuietDisk, some_records

from rorqual.errors import JournalError
from rorqual.journal import Close, Event, Journal, Reader, Tokens, compact, frames, replay_folder, verify
from rorqual.journal import columns as columnar
from rorqual.journal.segments import Bytes, list_segments


def write(folder: Path, number: int = 300, segment_bytes: int = 4000) -> None:
    with Journal(folder, segment_bytes=segment_bytes, disk=QuietDisk()) as journal:
        records = some_records(number)
        for start in range(0, number, 6):
            journal.append_many(records[start : start + 6])
            journal.commit()


def test_l8_compaction_equals_the_original_by_digest(tmp_path: Path) -> None:
    write(tmp_path / "j")
    before = {path.stem: path.read_bytes() for path in (tmp_path / "j").glob("*.seg")}
    records = list(replay_folder(tmp_path / "j"))
    done = compact(tmp_path / "j", disk=QuietDisk())
    assert len(done.segments) == len(before) - 1 >= 4 and not done.open_requests
    assert 0 < done.bytes_after < done.bytes_before
    for segment in list_segments(tmp_path / "j").segments[:-1]:
        assert segment.is_columnar and not segment.path.with_suffix(".seg").exists()
        restored = columnar.restore(segment)
        assert hashlib.sha256(restored).digest() == hashlib.sha256(before[segment.path.stem]).digest()
        assert columnar.read_index(segment).sha256 == hashlib.sha256(restored).hexdigest()
    assert list(replay_folder(tmp_path / "j")) == records
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        assert list(journal.replay()) == records and list(journal.replay(250)) == records[250:]
        assert list(Reader(tmp_path / "j").poll()) == records
        journal.append(Event("next"))
    assert verify(tmp_path / "j").ok
    assert len(compact(tmp_path / "j", disk=QuietDisk()).segments) == 1, "the one that was last is sealed now"


def test_l8_a_flipped_bit_in_a_columnar_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "j", 120)
    compact(tmp_path / "j", disk=QuietDisk())
    segment = list_segments(tmp_path / "j").segments[0]
    whole = segment.path.read_bytes()
    start = columnar.read_index(segment).start
    for at in range(0, len(whole), 13):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        segment.path.write_bytes(data)
        with pytest.raises(JournalError) as caught:
            list(replay_folder(tmp_path / "j"))
        assert caught.value.segment == segment.name and caught.value.offset is not None
        assert caught.value.offset <= at and (caught.value.offset >= start) == (at >= start)
        assert not verify(tmp_path / "j").ok
    for size in (0, 10, start, len(whole) - 1):
        segment.path.write_bytes(whole[:size])
        with pytest.raises(JournalError):
            list(replay_folder(tmp_path / "j"))


def test_segments_of_open_requests_stay(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", segment_bytes=500, disk=QuietDisk()) as journal:
        for request in range(6):
            for position in range(12):
                journal.append(Tokens(request, position, 0, (position,), (-1.0,)))
                journal.commit()
            if request != 2:
                journal.append(Close(request, "stop"))
        journal.commit()
        done = compact(tmp_path / "j", disk=QuietDisk())
        assert done.open_requests == [2] and done.segments
        kept = [segment for segment in list_segments(tmp_path / "j").segments if not segment.is_columnar]
        assert len(kept) > 2
        for segment in kept[:-1]:
            data = segment.path.read_bytes()
            seed = frames.decode_file_header(data, "").seed
            found = frames.iterate(data, 64, segment.first_lsn, seed)
            assert 2 in {int.from_bytes(data[begin : begin + 8], "little") for *_, begin, _ in found}
        journal.append(Close(2, "stop"))
        journal.commit()
        assert compact(tmp_path / "j", disk=QuietDisk()).open_requests == []
        assert [s.is_columnar for s in list_segments(tmp_path / "j").segments].count(False) == 1
        assert len(list(journal.replay())) == journal.durable_lsn


def test_an_interrupted_compaction_leaves_one_whole_copy(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Interrupted(QuietDisk):
        def __init__(self, steps: int) -> None:
            super().__init__()
            self.steps = steps

        def step(self) -> None:
            self.steps -= 1
            if self.steps < 0:
                raise Stop

        def create(self, path: Path) -> int:
            self.step()
            return super().create(path)

        def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
            self.step()
            super().write(descriptor, data, offset, synced=synced)

        def rename(self, old: Path, new: Path) -> None:
            self.step()
            super().rename(old, new)

        def unlink(self, path: Path) -> None:
            self.step()
            super().unlink(path)

    write(tmp_path / "j", 100)
    records = list(replay_folder(tmp_path / "j"))
    for steps in range(40):
        with contextlib.suppress(Stop):
            compact(tmp_path / "j", disk=Interrupted(steps % 5 + 1))
        assert list(replay_folder(tmp_path / "j")) == records
        with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
            assert list(journal.replay()) == records
    compact(tmp_path / "j", disk=QuietDisk())
    assert all(segment.is_columnar for segment in list_segments(tmp_path / "j").segments[:-1])
    assert not list((tmp_path / "j").glob("*.new"))


def test_a_damaged_segment_is_not_compacted(tmp_path: Path) -> None:
    write(tmp_path / "j", 100)
    segment = list_segments(tmp_path / "j").segments[1]
    data = bytearray(segment.path.read_bytes())
    data[200] ^= 4
    segment.path.write_bytes(data)
    with pytest.raises(JournalError) as caught:
        compact(tmp_path / "j", disk=QuietDisk())
    assert caught.value.segment == segment.name and segment.path.read_bytes() == data


def test_a_reader_follows_a_writer(tmp_path: Path) -> None:
    """Over rotations, reopenings and compaction; each record once and in order."""
    folder = tmp_path / "j"
    Journal(folder, disk=QuietDisk()).close()
    records = some_records(400)
    seen: list[tuple[int, object]] = []

    def read() -> None:
        with Reader(folder) as reader:
            for pair in reader.follow(poll_s=0.001, timeout_s=20):
                seen.append(pair)
                if len(seen) == len(records):
                    return

    thread = threading.Thread(target=read)
    thread.start()
    written = 0
    while written < len(records):
        with Journal(folder, segment_bytes=3000, disk=QuietDisk()) as journal:
            for _ in range(12):
                journal.append_many(records[written : written + 5])
                written = journal.commit()
                time.sleep(0.001)
        compact(folder, disk=QuietDisk())
    thread.join(20)
    assert seen == list(enumerate(records, 1))


def test_a_file_that_a_writer_cuts_while_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ask = tmp_path / "segment", os.fstat
    path.write_bytes(b"whale" * 1000)

    def cut_behind(descriptor: int) -> os.stat_result:
        found = ask(descriptor)
        os.truncate(path, 5)
        return found

    monkeypatch.setattr(os, "fstat", cut_behind)
    with Bytes(path) as file:
        assert file.size == 5 and bytes(file.data) == b"whale"


def test_a_reader_begins_behind_an_lsn_and_goes_on_after_a_killed_writer(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", disk=QuietDisk())
    journal.append_many(some_records(20))
    journal.commit()
    reader = Reader(tmp_path / "j", since=15)
    assert [lsn for lsn, _ in reader.poll()] == [16, 17, 18, 19, 20]
    assert list(reader.poll()) == []
    with Journal(tmp_path / "j", take_over=True, disk=QuietDisk()) as successor:
        successor.append(Event("on"))
        assert list(reader.poll()) == []
        successor.commit()
        assert list(reader.poll()) == [(21, Event("on"))]
    journal.close()


LARGE = """
import resource, sys
from pathlib import Path
from rorqual.journal import Journal, Tokens, frames, replay_folder
folder, number = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "write":
    with Journal(folder) as journal:
        for start in range(0, number, 5000):
            tokens = range(start, min(start + 5000, number))
            journal.append_many([Tokens(n % 64, n // 64, 0, (n % 129280,), (-0.5,)) for n in tokens])
            journal.commit()
        journal._disk.close(journal._file)  # as killed: not sealed, with room left
        journal._file = -1
else:
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    walked = 0
    whole = frames.whole_frames
    def counted(*arguments):
        global walked
        prefix = whole(*arguments)
        walked += prefix.next_lsn - arguments[2]
        return prefix
    frames.whole_frames = counted
    journal = Journal(folder)
    print(walked, journal.durable_lsn, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
    count = sum(1 for _ in journal.replay())
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.slow
def test_l7_ten_million_token_records_open_with_bounded_work_and_memory(tmp_path: Path) -> None:
    """Opening walks over no acknowledged record, and neither opening nor replay holds more than some segments."""
    number = often(2_000_000, 10_000_000)
    for what in ("write", "read"):
        run = subprocess.run(
            [sys.executable, "-c", LARGE, str(tmp_path / "j"), str(number), what],
            capture_output=True,
            text=True,
            check=True,
            timeout=500,
        )
    opening, replay = ([int(word) for word in line.split()] for line in run.stdout.splitlines())
    walked, durable, opened_kib = opening
    assert durable == number == replay[0]
    assert walked == 0, "everything was acknowledged, and opening looks behind that only"
    segment_kib = 64 << 10
    assert opened_kib < 3 * segment_kib and replay[1] < 4 * segment_kib
