"""K9: what a journal is after power went, at any moment, with what no sync covers dropped or reordered."""

from itertools import count
from pathlib import Path
from random import Random
from shutil import rmtree

import pytest
from full import often
from journal_disks import QuietDisk, RecordingDisk, lose_power, some_records

from rorqual.errors import JournalError
from rorqual.journal import Journal, Record, compact, verify

Log = list[tuple[object, ...]]


def recorded(folder: Path, disk: RecordingDisk, records: list[Record], random: Random) -> Log:
    """Batches of all sizes over several segments and writers, some of which just vanish, and a compaction."""
    written = 0
    while written < len(records):
        journal = Journal(folder, segment_bytes=12_000, take_over=written > 0, disk=disk)
        assert journal.durable_lsn >= written
        written = journal.durable_lsn  # with what a failed sync left, which counts from now on
        disk.acknowledge(written)
        for _ in range(random.randint(1, 12)):
            batch = records[written : written + random.choice([1, 1, 2, 7, 30])]
            journal.append_many(batch)
            written = journal.commit()
            disk.acknowledge(written)
        if written < len(records) and random.random() < 0.4:
            disk.fails = True
            journal.append_many(records[written : written + 9])
            with pytest.raises(JournalError, match="failed to write or sync"):
                journal.commit()
        elif random.random() < 0.5:
            journal.close()
            disk.acknowledge(written)
        if random.random() < 0.7:
            compact(folder, disk=disk)
    return disk.log


def test_k9_power_loss_with_unsynced_writes_dropped_or_reordered(tmp_path: Path) -> None:
    random, numbers = Random(2), count()
    records = some_records(300)
    log = recorded(tmp_path / "j", RecordingDisk(tmp_path / "j"), records, random)
    assert {entry[0] for entry in log} >= {"create", "written", "truncate", "sync", "rename", "unlink", "sync folder"}
    torn = 0
    for moment in moments(log, often(160, 6000), random):
        folder = tmp_path / f"image-{next(numbers)}"
        folder.mkdir()
        acknowledged = lose_power(log[:moment], random, folder)
        report = verify(folder)
        assert not report.problems, report.problems
        torn += report.torn_bytes > 0
        with Journal(folder, disk=QuietDisk()) as journal:
            found = [record for _, record in journal.replay()]
            assert len(found) == journal.durable_lsn >= acknowledged, "nothing acknowledged is lost"
            assert found == records[: len(found)], "and nothing is there that was not written"
            journal.append(records[len(found) % len(records)])
            journal.commit()
        with Journal(folder, disk=QuietDisk()) as journal:
            assert journal.durable_lsn == len(found) + 1 == len(list(journal.replay(len(found)))) + len(found)
        rmtree(folder)
    assert torn > 10, "the images have torn tails, or this shows nothing"


def moments(log: Log, number: int, random: Random) -> list[int]:
    """When power goes: half of the times within a write of frames that can tear."""
    writes = []
    for place, entry in enumerate(log):
        match entry:
            case ("write", _, _, bytes(data)) if len(data) > 600 and any(data):
                writes.append(place + 1)
    return [random.choice(writes) if turn % 2 else random.randint(1, len(log)) for turn in range(number)]


def test_k9_notices_a_writer_that_does_not_sync(tmp_path: Path) -> None:
    class Careless(RecordingDisk):
        def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
            super().write(descriptor, data, offset, synced=synced)
            if synced and any(data[64:]):
                del self.log[-1]  # it said so, and did not

    random, records = Random(2), some_records(60)
    log = recorded(tmp_path / "j", Careless(tmp_path / "j"), records, random)
    lost = 0
    for number, moment in enumerate(moments(log, 50, random)):
        folder = tmp_path / f"image-{number}"
        folder.mkdir()
        acknowledged = lose_power(log[:moment], random, folder)
        try:
            with Journal(folder, disk=QuietDisk()) as journal:
                lost += journal.durable_lsn < acknowledged
        except JournalError:
            lost += 1
    assert lost > 10
