"""Threads that compute nothing give their OpenMP workers back, and get others when they compute again."""

import os
import threading
from collections.abc import Callable
from queue import Queue
from typing import TypeVar

import pytest
import torch
from mock_model import HashModel, byte_tokenizer

from rorqual import Engine, SamplingParams
from rorqual.ops.native import worker_threads
from rorqual.ops.native.library import torch_openmp

T = TypeVar("T")

pytestmark = pytest.mark.skipif(
    torch_openmp() is None or not os.path.isdir("/proc/self/task"), reason="needs torch's libgomp on Linux"
)


def in_a_thread(work: Callable[[], list[T]]) -> list[T]:
    """What `work` returns in a thread of its own, where two threads compute."""
    found: list[T] = []

    def run() -> None:
        torch.set_num_threads(2)
        found.extend(work())

    before = torch.get_num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    return found


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_workers_end_when_they_are_given_back_and_come_again() -> None:
    def work() -> list[set[str]]:
        numbers, out = torch.ones(1 << 20), list[set[str]]()
        for _ in range(2):
            assert float((numbers + numbers).sum()) == 2 << 20
            out.append(threads())
            assert worker_threads.release()
            out.append(threads())
        return out

    with_one, without, again, at_last = in_a_thread(work)  # threads of other tests may end meanwhile
    worker = again - without
    assert len(worker) == 1 and not worker & at_last
    assert with_one - without, "another one was there before"


def test_the_number_of_threads_stays() -> None:
    def work() -> list[int]:
        worker_threads.release()
        return [torch.get_num_threads()]

    assert in_a_thread(work) == [2]


def test_an_engine_gives_workers_back_when_it_is_made_and_each_time_it_has_been_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back: Queue[str] = Queue()
    monkeypatch.setattr(worker_threads, "release", lambda: given_back.put(threading.current_thread().name))
    with Engine(HashModel(), byte_tokenizer()) as engine:
        assert given_back.get(timeout=30) == threading.current_thread().name
        for _ in range(2):
            assert given_back.get(timeout=30) == "rorqual-engine", "an engine without work"
            assert len(engine.submit([1, 2, 3], SamplingParams(max_tokens=3)).result().ids) == 3
