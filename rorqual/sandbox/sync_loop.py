"""The background loop on which the asynchronous implementation runs for callers that do not await.

One thread for the whole process. Callbacks run in the caller's own thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rorqual.errors import SandboxError

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0


def _background() -> asyncio.AbstractEventLoop:
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():  # threads do not survive a fork
            _loop = asyncio.new_event_loop()
            _owner = os.getpid()
            threading.Thread(target=_loop.run_forever, name="rorqual-sandbox", daemon=True).start()
        return _loop


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run on the background loop and wait. Raises: SandboxError inside a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        work.close()
        raise SandboxError(
            "Sandbox was called inside a running event loop, which it would block. Use AsyncSandbox there, with await."
        )
    future = asyncio.run_coroutine_threadsafe(work, _background())
    try:
        return future.result()
    except BaseException:  # also KeyboardInterrupt: nothing is left running behind the caller's back
        if not future.done():
            future.cancel()
            concurrent.futures.wait([future], timeout=5)
        raise


MAX_UNTAKEN = 4 << 20
"""Characters or bytes of output that wait for callbacks at most; what comes beyond is not handed to them."""


class Calls:
    """Takes callbacks of the background loop to the thread that waits.

    The loop may not wait for that thread, and a program inside can write faster than any callback takes: so what waits
    has a bound. The command's result is not touched by it.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[Any], None], Any] | None] = queue.SimpleQueue()
        self._untaken = 0
        self._counting = threading.Lock()

    def wrap(self, function: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
        """A callback for the loop's thread, by which `function` is called in that of `wait_for`; None for None."""
        if function is None:
            return None

        def later(value: Any) -> None:
            with self._counting:
                if self._untaken + len(value) > MAX_UNTAKEN:
                    return
                self._untaken += len(value)
            self._queue.put((function, value))

        return later

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop; callbacks are called here meanwhile. Raises: SandboxError in a running event loop."""

        async def whole() -> T:
            try:
                return await work
            finally:
                self._queue.put(None)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            return wait_for(work)  # refuses
        future = asyncio.run_coroutine_threadsafe(whole(), _background())
        try:
            while (item := self._queue.get()) is not None:
                with self._counting:
                    self._untaken -= len(item[1])
                item[0](item[1])
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                concurrent.futures.wait([future], timeout=5)
            raise
