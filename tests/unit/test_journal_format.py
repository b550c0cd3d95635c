"""What of a journal's files counts: cuts, flipped bits, frames that do not belong (L1, L2, L3), 1,000 crash points."""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import pytest
from full import often
from journal_disks import QuietDisk, copy_cut, some_records

from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, Reader, Record, Tokens, frames, replay_folder, verify
from rorqual.journal.recovery import recover
from rorqual.journal.segments import list_segments
from rorqual.journal.state import NAME as STATE
from rorqual.journal.state import State

Copier = Callable[..., Path]


def write(folder: Path, records: list[Record], *, batch: int = 3, segment_bytes: int = 64 << 20) -> None:
    with Journal(folder, segment_bytes=segment_bytes, disk=QuietDisk()) as journal:
        for start in range(0, len(records), batch):
            journal.append_many(records[start : start + batch])
            journal.commit()


def opened(folder: Path) -> list[Record]:
    """The records after an opening for writing, which cuts."""
    with Journal(folder, disk=QuietDisk()) as journal:
        return [record for _, record in journal.replay()]


def frame_starts(folder: Path, name: str) -> list[int]:
    """Where each frame of a segment begins, and where the last ends."""
    segment = next(segment for segment in list_segments(folder).segments if segment.name == name)
    data = segment.path.read_bytes()
    header = frames.decode_file_header(data, name)
    ends = [behind + 4 for *_, behind in frames.iterate(data, 64, segment.first_lsn, header.seed)]
    return [64, *ends]


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[Copier]:
    """Makes one copy after the other and removes the one before."""
    numbers = count()
    last: list[Path] = []

    def copy(source: Path, segment: str | None = None, size: int | None = None) -> Path:
        while last:
            shutil.rmtree(last.pop())
        target = tmp_path / f"copy-{next(numbers)}"
        copy_cut(source, target, segment, size)
        last.append(target)
        return target

    yield copy


def the_segment(folder: Path) -> Path:
    (path,) = folder.glob("*.seg")
    return path


@pytest.mark.parametrize("has_state", [True, False])
def test_l1_every_prefix_cut_opens_to_a_valid_prefix(tmp_path: Path, copies: Copier, has_state: bool) -> None:
    records = some_records(20)
    write(tmp_path / "whole", records)
    segment = the_segment(tmp_path / "whole")
    starts = frame_starts(tmp_path / "whole", segment.name)
    if not has_state:
        (tmp_path / "whole" / STATE).unlink()
    for size in reversed(range(len(segment.read_bytes()) + 1)):
        os.truncate(segment, size)
        whole = sum(end <= size for end in starts[1:])
        assert [record for _, record in replay_folder(tmp_path / "whole")] == records[:whole], size
        if size % 17 == 0 or size in starts:
            folder = copies(tmp_path / "whole")
            assert opened(folder) == records[:whole], size
            assert opened(folder) == records[:whole], "a second opening changes nothing"


def test_l1_a_cut_journal_goes_on(tmp_path: Path, copies: Copier) -> None:
    records = some_records(20)
    write(tmp_path / "whole", records)
    segment = the_segment(tmp_path / "whole")
    folder = copies(tmp_path / "whole", segment.name, 700)
    kept = len(opened(folder))
    with Journal(folder, disk=QuietDisk()) as journal:
        assert journal.append(Event("next")) == kept + 1
        journal.commit()
    assert opened(folder) == [*records[:kept], Event("next")]
    assert verify(folder).ok


def test_l2_single_bit_flips_are_detected_at_all_positions(tmp_path: Path) -> None:
    records = some_records(12)
    write(tmp_path / "j", records)
    (segment,) = list_segments(tmp_path / "j").segments
    state = State.load(tmp_path / "j", writable=False)
    assert state is not None
    mark = state.mark_of(segment.epoch, segment.first_lsn)
    starts = frame_starts(tmp_path / "j", segment.name)
    whole = segment.path.read_bytes()
    for room in (0, 2000):  # closed, and killed with room left
        data = bytearray(whole + bytes(room))
        assert recover(memoryview(data), segment, mark, has_state=True).next_lsn == len(records) + 1
        for at in range(starts[-1]):
            for bit in range(8):
                data[at] ^= 1 << bit
                with pytest.raises(JournalError) as caught:
                    recover(memoryview(data), segment, mark, has_state=True)
                place = 0 if at < 64 else max(start for start in starts if start <= at)
                assert (caught.value.offset, caught.value.segment) in [(place, segment.name), (8, segment.name)]
                data[at] ^= 1 << bit


@pytest.mark.parametrize("has_state", [True, False])
def test_l2_a_flipped_bit_is_refused_by_every_way_in(tmp_path: Path, copies: Copier, has_state: bool) -> None:
    records = some_records(12)
    write(tmp_path / "whole", records)
    random = Random(5)
    name = the_segment(tmp_path / "whole").name
    starts = frame_starts(tmp_path / "whole", name)
    for at in range(64, starts[-1], 7):
        folder = copies(tmp_path / "whole")
        place = max(start for start in starts if start <= at)
        if not has_state:
            (folder / STATE).unlink()
            if at - place in range(8, 12) and place == starts[-2]:
                continue  # the last frame's length: without the mark it may be a longer frame that was cut
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1 << random.randrange(8)
        (folder / name).write_bytes(data)
        number = starts.index(place)
        with pytest.raises(JournalError, match=f"damaged at byte {place}: the frame of LSN {number + 1} "):
            opened(folder)
        got: list[Record] = []
        with pytest.raises(JournalError) as caught:
            got.extend(record for _, record in replay_folder(folder))
        assert caught.value.offset == place
        report = verify(folder)
        assert not report.ok and report.problems[0].offset == place and report.last_lsn == number


def test_l2_a_flipped_bit_in_the_state_file_never_refuses_a_whole_journal(tmp_path: Path, copies: Copier) -> None:
    records = some_records(12)
    write(tmp_path / "whole", records)
    for at in (*range(0, 256, 3), *range(256, 4096, 61)):
        folder = copies(tmp_path / "whole")
        data = bytearray((folder / STATE).read_bytes())
        data[at] ^= 1 << at % 8
        (folder / STATE).write_bytes(data)
        assert [record for _, record in replay_folder(folder)] == records
        if at < 256:
            assert opened(folder) == records


def add(folder: Path, data: bytes) -> None:
    """Bytes behind the last frame, as of a commit that did not come to its end."""
    with the_segment(folder).open("ab") as file:
        file.write(data)


def frame_of(folder: Path, lsn: int, flags: int = 0, payload: bytes = b"") -> bytes:
    header = frames.decode_file_header(the_segment(folder).read_bytes(), "")
    payload = payload or Journal.__name__.encode()
    return frames.encode_frame(Event.TYPE, flags, lsn, payload, header.seed)


def test_l3_out_of_order_duplicate_and_foreign_frames_end_the_prefix(tmp_path: Path, copies: Copier) -> None:
    records = some_records(12)
    write(tmp_path / "whole", records)
    write(tmp_path / "other", some_records(13, seed=1))
    starts = frame_starts(tmp_path / "whole", the_segment(tmp_path / "whole").name)
    last = the_segment(tmp_path / "whole").read_bytes()[starts[-2] :]
    theirs = frame_starts(tmp_path / "other", the_segment(tmp_path / "other").name)
    foreign = the_segment(tmp_path / "other").read_bytes()[theirs[-2] :]
    for tail in (
        last,  # a duplicate
        frame_of(tmp_path / "whole", 14) + frame_of(tmp_path / "whole", 13),  # out of order
        frame_of(tmp_path / "whole", 5),
        foreign,  # the right LSN, another journal
        b"\xff" * 100,
    ):
        folder = copies(tmp_path / "whole")
        add(folder, tail)
        assert [record for _, record in replay_folder(folder)] == records
        assert verify(folder).torn_bytes == len(tail)
        assert opened(folder) == records
        assert len(the_segment(folder).read_bytes()) == starts[-1], "the tail is cut off and nothing else"


def test_l3_a_later_commit_proves_that_a_missing_frame_was_durable(tmp_path: Path) -> None:
    write(tmp_path / "j", some_records(12))
    end = frame_starts(tmp_path / "j", the_segment(tmp_path / "j").name)[-1]
    add(tmp_path / "j", frame_of(tmp_path / "j", 14, frames.FIRST_OF_COMMIT))
    with pytest.raises(
        JournalError, match=f"damaged at byte {end}: the frame of LSN 13 .* The frame at byte {end} proves"
    ) as caught:
        opened(tmp_path / "j")
    assert caught.value.offset == end


def test_a_frame_inside_a_payload_is_no_frame(tmp_path: Path) -> None:
    """What a tool prints may look like frames, whose writer cannot know where checksums of this journal start."""
    fake = frames.encode_frame(Event.TYPE, frames.FIRST_OF_COMMIT, 3, b"\x80", 0) * 20
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        journal.append(Event("one"))
        journal.commit()
    with Journal(tmp_path / "k", disk=QuietDisk()) as journal:
        journal.append(Event("output", {"text": fake}))
        journal.commit()
    torn = the_segment(tmp_path / "k").read_bytes()[64:-30]
    add(tmp_path / "j", torn)
    assert opened(tmp_path / "j") == [Event("one")]


def test_a_damaged_sealed_segment_is_never_skipped(tmp_path: Path) -> None:
    records = some_records(200)
    write(tmp_path / "j", records, segment_bytes=2000)
    segments = list_segments(tmp_path / "j").segments
    assert len(segments) > 4
    second = segments[1]
    for data in (second.path.read_bytes()[:-1], bytes(64), b""):  # cut in the middle of the journal: no torn tail
        second.path.write_bytes(data)
        with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
            got: list[Record] = []
            with pytest.raises(JournalError) as caught:
                got.extend(record for _, record in journal.replay())
            assert caught.value.segment == second.name
    second.path.unlink()
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal, pytest.raises(JournalError):
        list(journal.replay())
    assert not verify(tmp_path / "j").ok


def test_a_thousand_crash_points(tmp_path: Path, copies: Copier) -> None:
    """A cut gives exactly the records wholly before it; a flipped bit in a committed one is refused with its place."""
    records = some_records(240)
    write(tmp_path / "whole", records, segment_bytes=9000)
    assert opened(tmp_path / "whole") == records, "an untouched journal replays whole"
    segments = [s for s in list_segments(tmp_path / "whole").segments if s.path.stat().st_size > 64]
    starts = {segment.name: frame_starts(tmp_path / "whole", segment.name) for segment in segments}
    random = Random(11)
    for _ in range(often(500, 5000)):
        segment = random.choice(segments)
        ends = starts[segment.name]
        size = random.randint(0, ends[-1])
        folder = copies(tmp_path / "whole", segment.name, size)
        whole = segment.first_lsn - 1 + sum(end <= size for end in ends[1:])
        assert opened(folder) == records[:whole]
    for _ in range(often(500, 5000)):
        segment = random.choice(segments)
        ends = starts[segment.name]
        at = random.randrange(64, ends[-1])
        place = max(start for start in ends if start <= at)
        folder = copies(tmp_path / "whole")
        data = bytearray((folder / segment.name).read_bytes())
        data[at] ^= 1 << random.randrange(8)
        (folder / segment.name).write_bytes(data)
        with pytest.raises(JournalError) as caught:
            opened(folder)
        assert (caught.value.segment, caught.value.offset) == (segment.name, place)


@pytest.mark.parametrize("record", [Event("same size"), Tokens(1, 0, 0, (5,), (-1.0,))], ids=["event", "token"])
def test_l3_frames_out_of_order_in_a_sealed_segment_are_refused(tmp_path: Path, record: Record) -> None:
    write(tmp_path / "j", [record] * 9)
    path = the_segment(tmp_path / "j")
    starts = frame_starts(tmp_path / "j", path.name)
    write(tmp_path / "j", [record])  # in a segment of its own
    data = path.read_bytes()
    path.write_bytes(data[: starts[3]] + data[starts[4] : starts[5]] + data[starts[3] : starts[4]] + data[starts[5] :])
    for read in (lambda: opened(tmp_path / "j"), lambda: list(Reader(tmp_path / "j").poll())):
        with pytest.raises(JournalError, match="it has LSN 5") as caught:
            read()
        assert caught.value.offset == starts[3]


def test_a_segment_under_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "j", some_records(5))
    segment = the_segment(tmp_path / "j")
    segment.rename(segment.with_name("00000000000000000009-0000000001.seg"))
    with pytest.raises(JournalError, match="begins with LSN 1 in epoch 1. It was renamed"):
        opened(tmp_path / "j")


def test_a_later_format_is_named(tmp_path: Path) -> None:
    write(tmp_path / "j", [Tokens(1, 0, 0, (5,))])
    path = the_segment(tmp_path / "j")
    head = bytearray(path.read_bytes())
    head[8] = 9
    head[60:64] = frames.zlib.crc32(head[:60]).to_bytes(4, "little")
    path.write_bytes(head)
    with pytest.raises(JournalError, match="format version 9; this program reads version 1"):
        opened(tmp_path / "j")
