"""Ids that no other sandbox has: the counter survives whoever is killed over it."""

import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rorqual.errors import SandboxError
from rorqual.sandbox import host_ids

COUNTED = [(host_ids.fresh_uid, 1), (host_ids.fresh_range, host_ids.RANGE)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_ids, "COUNTERS", tmp_path / "counters")
    return tmp_path / "counters"


@pytest.mark.parametrize(("fresh", "step"), COUNTED)
def test_a_process_killed_while_it_writes_gives_no_id_again(fresh: Callable[[], int], step: int) -> None:
    given = [fresh() for _ in range(3)]
    child = os.fork()
    if child == 0:  # the kernel kills it at the very write, after whatever it did before
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        fresh()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    given += [fresh() for _ in range(3)]
    assert given == [given[0] + number * step for number in range(6)]


@pytest.mark.parametrize(("fresh", "step"), COUNTED)
def test_many_at_once_get_different_ones(fresh: Callable[[], int], step: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        given = sorted(pool.map(lambda _: fresh(), range(64)))
    assert given == list(range(given[0], given[0] + 64 * step, step))


def test_after_the_last_one_it_begins_anew(folder: Path) -> None:
    folder.mkdir()
    (folder / "last-uid").write_text(str(host_ids.LAST_UID - 1))
    assert [host_ids.fresh_uid(), host_ids.fresh_uid()] == [host_ids.LAST_UID, host_ids.FIRST_UID + 1]
    (folder / "last-range").write_text(str(host_ids.LAST_RANGE))
    assert host_ids.fresh_range() == host_ids.FIRST_RANGE + host_ids.RANGE


@pytest.mark.parametrize("text", ["", "many", "12 3"])
def test_a_damaged_counter_is_no_beginning(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "last-uid").write_text(text)
    with pytest.raises(SandboxError, match="remove that file"):
        host_ids.fresh_uid()
