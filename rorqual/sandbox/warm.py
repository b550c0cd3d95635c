"""Sandboxes kept ready before anyone asks: filled in the background, looked after, replaced when they die.

A warm sandbox gets a short life that is prolonged while its pool lives, so that none outlives a pool that was killed;
its own times begin when it is handed out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.spec import Lifetimes

_logger = log.get(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 30.0
"""Between tries to make a warm sandbox where it fails."""
KEEP_S, LOOK_S = 300.0, 60.0
"""How long a warm sandbox lives without its pool, and how often the pool looks after it."""
REFILL_AFTER_S = 0.1
"""After a hand-out, so that the making of the next does not slow the first steps of whoever got this one."""
ANSWER_S = 5.0
"""Within which a warm sandbox must answer, or is replaced."""


@dataclass(frozen=True)
class Template:
    """What a pool makes sandboxes of: a kind and further arguments of `Sandbox.create`, as sorted pairs."""

    kind: str = "container"
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kind: str = "container", **arguments: Any) -> Template:
        """The template for these arguments of `Sandbox.create`; equal arguments give equal templates."""
        return cls(kind, tuple(sorted((name, _frozen(value)) for name, value in arguments.items())))

    def keywords(self) -> dict[str, Any]:
        """The arguments for `Sandbox.create`."""
        return {"kind": self.kind} | {name: _thawed(value) for name, value in self.arguments}


def _frozen(value: Any) -> Any:
    """A hashable form of an argument: mappings as pairs behind a mark, sequences as tuples."""
    if isinstance(value, Mapping):
        return ("mapping", tuple(sorted((key, _frozen(item)) for key, item in value.items())))
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "mapping":
        return {key: _thawed(item) for key, item in value[1]}
    return value


class Warm:
    """`wanted` sandboxes of each template, ready. make: makes one of a template, with further arguments."""

    def __init__(self, wanted: Mapping[Template, int], make: Callable[..., Awaitable[AsyncSandbox]]) -> None:
        self._wanted = dict(wanted)
        self._make = make
        self._ready: dict[Template, list[AsyncSandbox]] = {template: [] for template in self._wanted}
        self._filling: set[Template] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._ready.values()))

    async def start(self) -> None:
        """Fill up, then go on looking after them. Raises: SandboxError for a template that cannot be made."""
        for template, count in self._wanted.items():
            while len(self._ready[template]) < count:
                self._ready[template].append(await self._new(template))
        if self._wanted:
            self._in_background(self._look_after())

    async def take(self, template: Template) -> AsyncSandbox | None:
        """One that answers, with its own times from now on; None when there is none. Dead ones are replaced."""
        ready = self._ready.get(template, [])
        while ready:
            sandbox = ready.pop(0)
            try:
                usual = Lifetimes()
                asked = template.keywords()
                alive = await self._answers(
                    sandbox, asked.get("idle_ttl", usual.idle_ttl), asked.get("max_lifetime", usual.max_lifetime)
                )
            except BaseException:
                if self._open:
                    ready.insert(0, sandbox)
                else:
                    await asyncio.shield(sandbox.close())
                raise
            finally:
                self._refill(template)
            if alive:
                self.counts["handed out"] += 1
                return sandbox
        return None

    async def look(self) -> None:
        """Prolong the life of those that answer and replace those that do not."""
        for template, ready in self._ready.items():
            for sandbox in list(ready):
                if sandbox not in ready:  # handed out meanwhile: its times are its holder's now
                    continue
                ready.remove(sandbox)
                alive = True
                try:
                    alive = await self._answers(sandbox, KEEP_S, KEEP_S)
                finally:
                    if alive:
                        ready.append(sandbox)
            self._refill(template)

    async def close(self) -> None:
        """End them all. Raises: the first error, after all were tried."""
        self._open = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        spare = [sandbox for ready in self._ready.values() for sandbox in ready]
        self._ready = {template: [] for template in self._wanted}
        for ended in await asyncio.gather(*(sandbox.close() for sandbox in spare), return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    async def _new(self, template: Template) -> AsyncSandbox:
        return await self._make(template, idle_ttl=KEEP_S, max_lifetime=KEEP_S)

    async def _answers(self, sandbox: AsyncSandbox, idle_ttl: float, lifetime: float) -> bool:
        """Give it these times from now on; one that does not answer is cleared away."""
        try:
            age = time.time() - (await sandbox.info()).created
            await asyncio.wait_for(sandbox.set_ttl(idle=idle_ttl, max_lifetime=age + lifetime), ANSWER_S)
            return True
        except (SandboxError, TimeoutError) as error:
            _logger.warning("a warm sandbox no longer answers and is replaced: %s", error)
            self.counts["replaced"] += 1
            with contextlib.suppress(SandboxError):
                await sandbox.close()
            return False

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    def _refill(self, template: Template) -> None:
        if self._open and template not in self._filling:
            self._filling.add(template)
            self._in_background(self._fill(template))

    async def _fill(self, template: Template) -> None:
        """Make warm sandboxes until there are as many as wanted, one after the other."""
        wait_s = FIRST_WAIT_S
        try:
            await asyncio.sleep(REFILL_AFTER_S)
            while len(self._ready[template]) < self._wanted[template]:
                try:
                    self._ready[template].append(await self._new(template))
                    wait_s = FIRST_WAIT_S
                except SandboxError as error:
                    if not self._open:
                        return
                    _logger.warning(
                        "no warm %s sandbox could be made, again in %.1f s: %s", template.kind, wait_s, error
                    )
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        finally:
            self._filling.discard(template)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.warning("warm sandboxes could not be looked after: %s", error)
