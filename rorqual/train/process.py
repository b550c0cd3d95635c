"""What a run changes in the process it runs in, and puts back: torch's global settings and the stop signals."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rorqual import log

logger = log.get(__name__)

_deterministic: Any = torch.utils.deterministic
"""A module whose switch torch defines as a property of the module's class, where type checkers do not look."""


@contextmanager
def restored_globals() -> Iterator[None]:
    """Put torch's process-wide settings back after the run."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM so that the step in progress ends and is saved; a second one interrupts at
    once.
    """
    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("Stopping after this step; the run will be saved.")

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
    except ValueError:  # not in the main thread: the caller keeps the signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def prepare_process(threads: int) -> None:
    """Fix what results could depend on: the thread count, and operations whose order is otherwise free."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = False
