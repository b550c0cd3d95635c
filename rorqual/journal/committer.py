"""A thread that commits for callers who do not wait, or wait in an event loop.

It has no timer: it commits as soon as it is asked, and what is asked meanwhile shares the next sync.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from rorqual.errors import JournalError

_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[int]"]


class Committer:
    """Runs `commit` in a thread of its own, which begins with the first request."""

    def __init__(self, commit: Callable[[], int], name: str) -> None:
        self._commit = commit
        self._asked: SimpleQueue[_Waiter | bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"journal {name}", daemon=True)
        self._thread.start()
        self.failure: JournalError | None = None
        """Why the newest attempt failed; None when it did not."""

    def ask(self) -> None:
        """Commit what is appended now; returns at once."""
        self._asked.put(True)

    async def wait(self) -> int:
        """Commit what is appended now and return the durable LSN. Raises: JournalError."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        self._asked.put((loop, future))
        return await future

    def stop(self) -> None:
        """End the thread once it has answered what was asked."""
        self._asked.put(False)
        self._thread.join()

    def _run(self) -> None:
        while True:
            asked = [self._asked.get()]
            try:
                while True:
                    asked.append(self._asked.get_nowait())
            except Empty:
                pass
            result: int | JournalError
            try:
                result = self._commit()
                self.failure = None
            except JournalError as error:
                result = self.failure = error
            except Exception as error:  # our own mistake; those who wait must hear of it, too
                result = self.failure = JournalError(f"the journal's thread failed to commit: {error!r}")
            waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[int]]] = {}
            for one in asked:
                if isinstance(one, tuple):
                    waiting.setdefault(one[0], []).append(one[1])
            for loop, futures in waiting.items():
                with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits there any more
                    loop.call_soon_threadsafe(_answer, futures, result)
            if False in asked:
                return


def _answer(futures: "list[asyncio.Future[int]]", result: int | JournalError) -> None:
    for future in futures:
        if future.done():  # its waiter was cancelled
            continue
        if isinstance(result, JournalError):
            future.set_exception(result)
        else:
            future.set_result(result)
