"""The disk cache: what is read is what was written, or nothing, whatever happened to the files or the process."""

import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_writer import (
    BUDGET,
    FINGERPRINT,
    PAGE_BYTES,
    PAGE_TOKENS,
    POINT_BYTES,
    blocks,
    content,
    write,
    write_forever,
)
from full import often

from rorqual.engine.store import DiskStore, disk, records
from rorqual.engine.store.checksum import checksum, reference


def open_store(folder: Path, budget: int = BUDGET, **options: int) -> DiskStore:
    return DiskStore(folder, FINGERPRINT, budget, **options)


def read_all(store: DiskStore, seed: int, count: int) -> tuple[int, int]:
    """Pages and checkpoints of a text that are there, each compared with what it must be."""
    found = []
    for _, key, block in blocks(seed, count):
        one = store.find_page(key, block)
        if one is None:
            break
        found.append(one)
    out = torch.zeros(len(found), PAGE_BYTES, dtype=torch.uint8)

    def sink(first: int, pages: torch.Tensor) -> None:
        out[first : first + len(pages)] = pages

    sound = store.read_pages(found, sink)
    points = 0
    for i, (_, key, _) in enumerate(blocks(seed, sound)):
        assert torch.equal(out[i], content(key, PAGE_BYTES, "page"))
        for point in store.find_points(key):
            loaded = store.read_point(point)
            if loaded is not None:
                assert torch.equal(loaded[0], content(key, POINT_BYTES, "point"))
                assert loaded[1] is not None and loaded[1].tolist() == [float(i)] * 16
                points += 1
    return sound, points


def files(folder: Path, suffix: str = ".pages") -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


def test_written_then_read_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 1, 30)
    write(store, 2, 10)
    store.flush()
    assert read_all(store, 1, 30) == (30, 10)
    store.close()
    store = open_store(tmp_path)
    assert read_all(store, 1, 40) == (30, 10) and read_all(store, 2, 10) == (10, 3)
    assert store.find_page(b"?" * 16, b"") is None
    write(store, 1, 30)  # nothing is written twice
    store.flush()
    assert store.stats.records_written == 0
    store.close()


def test_a_page_is_found_behind_another_whether_or_not_it_is_the_only_one(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 1, 4)
    write(store, 2, 2)  # begins like every text from the same root
    store.flush()
    for seed, count in ((1, 4), (2, 2)):
        for parent, key, block in blocks(seed, count):
            one = store.find_next(parent, block)
            assert one is not None and one is store.find_page(key, block)
            assert store.find_next(parent, block[::-1]) is None and store.find_next(key, block) is None
    store.close()


def test_pages_are_read_in_any_order_and_from_several_files(tmp_path: Path) -> None:
    store = open_store(tmp_path, 1 << 20)  # segments of 64 KiB
    write(store, 1, 30)
    write(store, 2, 30)
    store.flush()
    found = [store.find_page(key, block) for seed in (2, 1) for _, key, block in blocks(seed, 30)]
    pages = [one for one in found if one is not None]
    pages = [*pages[::3], *pages[1::3], *pages[40:50]]
    assert len({one.segment.path for one in pages}) > 1
    read: list[torch.Tensor] = []
    assert store.read_pages(pages, lambda _, content: read.extend(content.clone())) == len(pages)
    for one, got in zip(pages, read, strict=True):
        assert torch.equal(got, content(one.header.key, PAGE_BYTES, "page"))
    store.close()


def test_expecting_pages_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RUN_BYTES", 256)
    before = set(threading.enumerate())
    store = open_store(tmp_path)
    write(store, 1, 12)
    store.flush()
    first = store.find_page(*next((key, block) for _, key, block in blocks(1, 12)))
    assert first is not None
    for count in (1, 12, 10_000):  # one, those that are there, and beyond the end of the file
        store.expect(first, count)
    for path in files(tmp_path):
        path.unlink()
    store.expect(first, 12)  # gone meanwhile
    for thread in set(threading.enumerate()) - before - {store._writer}:
        thread.join(10)
        assert not thread.is_alive()
    assert read_all(store, 1, 12) == (12, 4)
    store.close()


def test_bytes_on_disk_are_the_formula(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 1, 12)
    store.flush()
    page = records.HEADER + records.padded(4 * PAGE_TOKENS) + records.padded(PAGE_BYTES)
    point = records.HEADER + records.padded(64 + POINT_BYTES)
    assert store.nbytes == 64 + 12 * page + 64 + 4 * point
    assert store.nbytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    store.close()


def test_another_process_reads_while_this_one_writes(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    write(first, 1, 20)
    first.flush()
    assert read_all(second, 1, 20) == (0, 0)
    second.refresh(force=True)
    assert read_all(second, 1, 20) == (20, 6)
    write(second, 2, 20)
    second.flush()
    first.refresh(force=True)
    assert read_all(first, 2, 20) == (20, 6)
    first.close()
    second.close()


def test_a_deleted_segment_is_forgotten(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    write(first, 1, 20)
    first.close()
    first, second = open_store(tmp_path), open_store(tmp_path)
    for path in files(tmp_path):
        path.unlink()
    assert read_all(second, 1, 20)[0] == 20, "who has it open goes on reading"
    first.refresh(force=True)
    assert read_all(first, 1, 20)[0] == 0
    first.close()
    second.close()


def test_the_folder_stays_in_its_budget(tmp_path: Path) -> None:
    budget = 2 << 20
    store = open_store(tmp_path, budget)
    for seed in range(12):
        write(store, seed, 40)
        store.flush()
        assert store.nbytes <= budget + store.segment_bytes
        for segment in store._segments.values():
            segment.used -= 100  # time passes
    assert store.stats.segments_deleted > 5
    assert read_all(store, 11, 40)[0] == 40, "the newest text is there"
    assert read_all(store, 0, 40)[0] == 0, "the oldest had to go"
    store.close()


def test_what_is_deleted_for_room_between_finding_and_reading_is_not_called_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    write(store, 1, 12)
    store.close()
    store = open_store(tmp_path)
    found = [store.find_page(key, block) for _, key, block in blocks(1, 12)]
    points = [point for _, key, _ in blocks(1, 12) for point in store.find_points(key)]
    pages = [page for page in found if page is not None]
    assert len(pages) == 12 and points
    store.budget = 0
    store._make_room(0)
    assert store.read_pages(pages, lambda first, content: pytest.fail("nothing is there")) == 0
    assert [store.read_point(point) for point in points] == [None] * len(points)
    assert store.stats.discarded == 0 and not caplog.records
    assert store.find_page(pages[0].header.key, pages[0].header.tokens) is None
    store.close()


def test_checkpoints_go_before_pages_of_the_same_age(tmp_path: Path) -> None:
    store = open_store(tmp_path, 4 << 20)
    for seed in range(6):
        write(store, seed, 40)
    store.flush()
    for segment in store._segments.values():
        segment.used = time.time() - 100
    before = len(files(tmp_path)), len(files(tmp_path, ".points"))
    store.budget = store.nbytes - 200_000
    store._make_room(0)
    assert len(files(tmp_path)) == before[0] and len(files(tmp_path, ".points")) < before[1]
    store.close()


def test_the_write_budget_keeps_a_quarter_for_ends_of_outputs(tmp_path: Path) -> None:
    store = open_store(tmp_path, write_bytes_per_hour=200_000)
    write(store, 1, 60)
    store.flush()
    assert 100_000 < store.stats.bytes_written <= 150_000 and store.stats.not_written
    key = blocks(1, 1)[0][1]
    assert store.put_point(key, b"tail", 9, content(key, POINT_BYTES, "point"), None, is_last=True)
    store.close()


@pytest.mark.parametrize("where", ["head", "header", "tokens", "content", "middle of content", "hidden"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path)
    write(store, 1, 12)
    store.close()
    page = records.HEADER + 64 + records.padded(PAGE_BYTES)
    at = {
        "head": 3,
        "header": 64 + 4 * page + 50,
        "tokens": 64 + 4 * page + records.HEADER + 5,
        "content": 64 + 4 * page + records.HEADER + 64,
        "middle of content": 64 + 4 * page + records.HEADER + 64 + PAGE_BYTES // 2,
        "hidden": 64 + records.HEADER + 7,
    }[where]
    [path] = files(tmp_path, ".points" if where == "hidden" else ".pages")
    if where in ("header", "tokens"):
        path.with_name(path.name + ".index").unlink()  # else they are read from there
    data = bytearray(path.read_bytes())
    data[at] ^= 0x80
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        store = open_store(tmp_path)
        sound, points = read_all(store, 1, 12)
    assert (sound, points) == {"head": (0, 0), "hidden": (12, 3)}.get(where, (4, 1))
    assert len(caplog.records) == 1
    assert ("ignored" if where == "head" else "discarded") in caplog.text
    store.close()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        store = open_store(tmp_path)
        assert read_all(store, 1, 12) == (sound, points)
    if "content" in where or where == "hidden":
        assert not caplog.records, "a discarded record is not tried again"
    write(store, 1, 12)  # what was lost is stored anew
    store.flush()
    assert read_all(store, 1, 12) == (12, 4)
    store.close()


def test_an_index_beside_a_segment_saves_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    write(store, 1, 30)
    store.close()
    indexes = files(tmp_path, ".index")
    assert len(indexes) == 2
    reads, real = [0], os.pread

    def counted(*args: int) -> bytes:
        reads[0] += 1
        return real(*args)

    monkeypatch.setattr(os, "pread", counted)
    store = open_store(tmp_path)
    assert reads[0] == 2, "the heads of the two files"
    assert read_all(store, 1, 30) == (30, 10)
    store.close()
    for damage in (b"", indexes[0].read_bytes()[:-1], indexes[0].read_bytes()[:500] + b"?" + b"x" * 50):
        indexes[0].write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            store = open_store(tmp_path)
        assert "is damaged and has been discarded" in caplog.text and not indexes[0].exists()
        assert read_all(store, 1, 30) == (30, 10), "without a sound index the segment is scanned"
        store.close()


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100, 192, 300, 5_000, 5_312, 5_400, 20_000])
def test_a_cut_file_loses_its_end_only(tmp_path: Path, cut: int) -> None:
    store = open_store(tmp_path)
    write(store, 1, 12)
    store.close()
    [path] = files(tmp_path)
    page = records.HEADER + 64 + records.padded(PAGE_BYTES)
    size = path.stat().st_size - cut
    os.truncate(path, size)
    store = open_store(tmp_path)
    assert read_all(store, 1, 12)[0] == (size - 64) // page
    store.close()


def test_garbage_in_the_folder_does_no_harm(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 1, 6)
    store.close()
    folder = files(tmp_path)[0].parent
    draw = random.Random(5)
    for number in range(8):
        (folder / f"{number}.pages").write_bytes(draw.randbytes(draw.choice([0, 10, 64, 4000])))
    (folder / "notes.txt").write_text("mine")
    store = open_store(tmp_path)
    assert read_all(store, 1, 6) == (6, 2)
    store.close()


def test_what_a_writer_left_as_it_began_is_said_once_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    write(store, 1, 6)
    store.close()
    folder = files(tmp_path)[0].parent
    begun, old, foreign = folder / "1.pages", folder / "2.points", folder / "3.pages"
    for path, size in ((begun, 0), (old, 20), (foreign, 300)):
        path.write_bytes(b"x" * size)
    os.utime(old, (1e9, 1e9))
    with caplog.at_level(logging.WARNING):
        store = open_store(tmp_path)
        for _ in range(3):
            store.refresh(force=True)
    assert sorted(Path(record.args[0]).name for record in caplog.records) == ["2.points", "3.pages"]  # type: ignore[index,arg-type]
    assert begun.exists() and foreign.exists() and not old.exists()
    assert read_all(store, 1, 6) == (6, 2)
    store.close()


def test_a_full_disk_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    write(store, 1, 6)
    store.flush()
    real = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        if len(data) > 1000:
            real(fd, data[:700], at)
            raise OSError(28, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    write(store, 2, 3)
    store.flush()
    assert store.stats.not_written == 4
    monkeypatch.undo()
    write(store, 3, 6)
    store.flush()
    assert read_all(store, 1, 6) == (6, 2) and read_all(store, 2, 3) == (0, 0) and read_all(store, 3, 6) == (6, 2)
    store.close()
    store = open_store(tmp_path)
    assert read_all(store, 1, 6) == (6, 2) and read_all(store, 3, 6) == (6, 2)
    store.close()


def test_a_disk_that_stays_full_costs_neither_files_nor_a_flood_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No room even for a segment's head, nor for an index at the end; said once, and once more when there is room."""
    store = open_store(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level("INFO"):
        patched.setattr(os, "pwrite", full)
        write(store, 1, 20)
        store.flush()
        assert store.stats.not_written >= 20 and not list(store.folder.glob("*.p*"))
        if descriptors:
            assert len(os.listdir("/proc/self/fd")) <= descriptors
    with caplog.at_level("INFO"):
        write(store, 2, 3)
        store.flush()
    assert sum("could not write" in line for line in caplog.messages) == 1
    assert sum("writes again" in line for line in caplog.messages) == 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        store.close()
    assert not list(store.folder.glob("*.new")) and not list(store.folder.glob("*.index"))
    store = open_store(tmp_path)
    assert read_all(store, 1, 20) == (0, 0) and read_all(store, 2, 3)[0] == 3
    store.close()


def kill_often(folder: Path, times: int, seed: int) -> int:
    """Writers killed at random moments, one after the other in one folder; returns the pages that were found sound."""
    draw, sound = random.Random(seed), 0
    for number in range(times):
        ready, told = os.pipe()
        child = os.fork()
        if not child:
            try:
                write_forever(str(folder), number % 7, told)
            finally:
                os._exit(1)
        assert os.read(ready, 1) == b"!"
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(ready)
        os.close(told)
        store = open_store(folder)
        for text in range(number % 7, number % 7 + 12):
            sound += read_all(store, text, 40)[0]
        assert store.stats.discarded == 0, "what a scan accepts is whole: a torn record is seen there"
        store.close()
    return sound


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_writers_killed_at_any_moment(tmp_path: Path) -> None:
    assert kill_often(tmp_path, 10, 1) > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_writers_killed_many_times(tmp_path: Path) -> None:
    kills = often(60, 200)
    assert kill_often(tmp_path, kills, 2) > 5 * kills


def test_the_checksum_in_c_is_the_reference() -> None:
    draw = np.random.default_rng(4)
    for count in (0, 1, 7, 8, 4095, 4096, 4097, 20_000):
        words = draw.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        assert checksum(words) == reference(words)


def test_the_checksum_sees_every_change_of_a_word_and_swaps() -> None:
    draw = np.random.default_rng(3)
    words = draw.integers(0, 1 << 63, 10_000, dtype=np.uint64)
    truth = checksum(words)
    for _ in range(300):
        other = words.copy()
        other[draw.integers(10_000)] ^= np.uint64(1) << np.uint64(draw.integers(64))
        assert checksum(other) != truth
    for _ in range(300):  # two top bits: their products with odd numbers cancel in the first sum
        other = words.copy()
        other[draw.choice(10_000, 2, replace=False)] ^= np.uint64(1 << 63)
        assert checksum(other) != truth
    other = words.copy()
    other[[17, 9_000]] = other[[9_000, 17]]
    assert checksum(other) != truth and checksum(words[:-1]) != truth
    assert checksum(np.zeros(8, dtype=np.uint64)) != checksum(np.zeros(16, dtype=np.uint64))
