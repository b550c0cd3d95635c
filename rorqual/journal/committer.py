"""A thread that commits for callers who do not wait, or wait in an event loop.

It commits as soon as it is asked, and what is asked meanwhile shares the next sync. Asked to gather first, it waits so
long and then commits; while records keep coming it goes on at that pace by itself, so that the asking thread (a
decoder) wakes nobody.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from rorqual.errors import JournalError

_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[int]"]
_Asked = _Waiter | float | None
"""Who waits for an answer; by when to begin a commit (0: at once); None: the end."""


class Committer:
    """Runs `commit` in a thread of its own. `is_waiting` tells whether there is anything to commit."""

    def __init__(self, commit: Callable[[], int], is_waiting: Callable[[], bool], name: str) -> None:
        self._commit, self._is_waiting, self._name = commit, is_waiting, name
        self._asked: SimpleQueue[_Asked] = SimpleQueue()
        self._lock, self._is_stopped = threading.Lock(), False
        self._pace_s: float | None = None  # a commit begins at least that often, without being asked
        self.failure: JournalError | None = None
        """Why the newest attempt failed; None when it did not."""
        self._thread = threading.Thread(target=self._run, name=f"journal {name}", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Commit what is appended now; returns at once. Raises: JournalError after `stop`."""
        self._put(0.0)

    def ask_within(self, seconds: float) -> None:
        """The same, begun within so many seconds."""
        pace_s = self._pace_s
        if pace_s is None or seconds < pace_s:
            self._pace_s = seconds
            self._put(time.monotonic() + seconds)

    async def wait(self) -> int:
        """Commit what is appended now and return the durable LSN. Raises: JournalError, also after `stop`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        self._put((loop, future))
        return await future

    def stop(self) -> None:
        """End the thread once it has answered what was asked."""
        with self._lock:
            self._is_stopped = True
            self._asked.put(None)
        self._thread.join()

    def _put(self, asked: _Asked) -> None:
        with self._lock:  # so that nothing comes behind the end, where nobody would answer it
            if self._is_stopped:
                raise JournalError(f"the journal {self._name} is closed. Open it anew to append.")
            self._asked.put(asked)

    def _run(self) -> None:
        due: float | None = None
        while True:
            asked = self._next(due)
            due = min((one for one in (due, *asked) if isinstance(one, float)), default=None)
            waiters = [one for one in asked if isinstance(one, tuple)]
            is_end = None in asked
            if is_end or waiters or (due is not None and due <= time.monotonic()):
                has_work = self._is_waiting()
                result = self._attempt()
                _tell(waiters, result)
                due = self._next_due(goes_on=has_work and not isinstance(result, JournalError))
            if is_end:
                return

    def _next(self, due: float | None) -> list[_Asked]:
        """All that was asked, once there is something; nothing when `due` comes first."""
        try:
            asked = [self._asked.get(timeout=None if due is None else max(0.0, due - time.monotonic()))]
        except Empty:
            return []
        while not self._asked.empty():  # nobody else takes from it
            asked.append(self._asked.get())
        return asked

    def _attempt(self) -> int | JournalError:
        try:
            result = self._commit()
        except JournalError as error:
            self.failure = error
            return error
        except Exception as error:  # our own mistake; those who wait must hear of it, too
            self.failure = JournalError(f"the journal's thread failed to commit: {error!r}")
            return self.failure
        self.failure = None
        return result

    def _next_due(self, *, goes_on: bool) -> float | None:
        """When the next commit begins by itself. The pace ends when a commit found nothing, or failed."""
        pace_s = self._pace_s
        if pace_s is None:
            return None
        if not goes_on:
            self._pace_s = None
            if self.failure is not None or not self._is_waiting():
                return None
            self._pace_s = pace_s  # appended just before, by a thread that saw the pace and asked for nothing
        return time.monotonic() + pace_s


def _tell(waiters: list[_Waiter], result: int | JournalError) -> None:
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[int]]] = {}
    for loop, future in waiters:
        waiting.setdefault(loop, []).append(future)
    for loop, futures in waiting.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits there any more
            loop.call_soon_threadsafe(_answer, futures, result)


def _answer(futures: "list[asyncio.Future[int]]", result: int | JournalError) -> None:
    for future in futures:
        if future.done():  # its waiter was cancelled
            continue
        if isinstance(result, JournalError):
            future.set_exception(result)
        else:
            future.set_result(result)
