"""The way to a sandbox's agent that mends itself: opens the channel, opens it again, and knows when all is over."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from rorqual.sandbox import processes
from rorqual.sandbox.channel import Channel
from rorqual.sandbox.clock import RunningClock
from rorqual.sandbox.drivers.base import Driver, Running
from rorqual.sandbox.errors import StaleEpoch, TransportError
from rorqual.sandbox.home import Home, Record, gone
from rorqual.sandbox.spec import SandboxSpec
from rorqual.sandbox.wire import Fields, Tag, Type, Value

Listener = Callable[[int, Fields], None]
PATIENCE_S = 120.0
"""Seconds until an agent that does not answer what it can answer at once is given up."""
LOOK_S = 0.25
_UNBOUNDED = {Type.WAIT, Type.PORT_OPEN, Type.PORT_DATA, Type.SYNC}
BREAK = 0
"""Kind of the event that tells a listener that the connection broke."""


def provision_fields(spec: SandboxSpec, running: Running, created: float) -> list[tuple[Tag, Value]]:
    """What a fresh agent is told once: user, environment, limits and times.

    A driver adjusts it through `running.extra`: nproc and data_limit_mb (0: the group holds it), cpu_locked, filter.
    """
    extra, limits, lifetimes = running.extra, spec.limits, spec.lifetimes
    home = "/root" if spec.user == "root" else f"/home/{spec.user}"
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": path, "HOME": home, "LANG": "C.UTF-8", "TERM": "xterm-256color", **spec.env}
    left = max(1.0, created + lifetimes.max_lifetime - time.time())
    fields: list[tuple[Tag, Value]] = [
        (Tag.USER, spec.user),
        (Tag.IDLE_MS, milliseconds(lifetimes.idle_ttl)),
        (Tag.LIFE_MS, milliseconds(left)),
        (Tag.NPROC, int(extra.get("nproc", limits.pids))),
        (Tag.NOFILE, limits.open_files),
        (Tag.FSIZE, limits.file_mb << 20),
        (Tag.DATA_LIMIT, int(extra.get("data_limit_mb", 0)) << 20),
        (Tag.FILTER, int(extra.get("filter", True))),
        (Tag.CPU_LOCKED, int(extra.get("cpu_locked", False))),
    ]
    if spec.cwd is not None:
        fields.append((Tag.CWD, spec.cwd))
    return fields + [(Tag.ENV, f"{name}={value}") for name, value in env.items()]


def milliseconds(seconds: float) -> int:
    """As the agent takes a time: 0 stands for none."""
    return 0 if seconds == float("inf") else max(1, int(seconds * 1000))


class Link:
    """Requests to one sandbox's agent; the connection is made again when it broke and the sandbox still lives."""

    def __init__(self, driver: Driver, home: Home, record: Record, clock: RunningClock | None = None) -> None:
        self.driver = driver
        self.home = home
        self.record = record
        self._clock = clock or RunningClock()
        self.listeners: dict[str | int, Listener] = {}
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    @property
    def running(self) -> Running:
        """What the driver started."""
        if self.record.running is None:  # a start that failed left nothing
            raise gone(self.home.id, "crashed")
        return self.record.running

    async def open(self, *, within_s: float, first: bool = False) -> None:
        """Open the channel; a fresh agent may need time until it listens. Raises: Gone, TransportError, StaleEpoch."""
        end = time.monotonic() + within_s
        pause = 0.002
        while True:
            try:
                left = max(0.05, end - time.monotonic())
                self._channel = await asyncio.wait_for(self._connect_while_alive(first), left)
                return
            except (TransportError, OSError, TimeoutError) as error:
                reason = self._over()
                if reason is not None:
                    raise gone(self.home.id, reason) from error
                if time.monotonic() + pause > end:
                    raise TransportError(
                        f"the agent of sandbox {self.home.id} did not answer within {within_s:g} s: {error}"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)

    async def _connect_while_alive(self, first: bool) -> Channel:
        """Connect, but wait for no answer of a sandbox that died meanwhile: what is left of it may hold its socket."""
        connecting = asyncio.ensure_future(self._connect(first))
        try:
            while not (await asyncio.wait({connecting}, timeout=0.2))[0]:
                if self._over() is not None:
                    raise TransportError("it ended before it answered.")
            return await connecting
        finally:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)

    async def _connect(self, first: bool) -> Channel:
        reader, writer = await self.driver.connect(self.running, self.home.path)
        fields = provision_fields(self.record.spec, self.running, self.record.created) if first else None
        secret = bytes.fromhex(self.running.secret)
        return await Channel.open(reader, writer, secret, self.record.attach_epoch, self._event, fields)

    def _over(self) -> str | None:
        """Why it is no more; a keeper that was killed leaves no word."""
        reason = self.home.ended()
        if reason is None and not any(processes.alive(process) for process in self.running.processes):
            reason = self.home.ended() or "crashed"
        return reason

    def _event(self, kind: int, fields: Fields) -> None:
        if kind == BREAK:
            for listener in list(self.listeners.values()):
                listener(BREAK, fields)
            return
        key: str | int = fields.text(Tag.HANDLE) if fields.has(Tag.HANDLE) else fields.number(Tag.ID)
        if key in self.listeners:
            self.listeners[key](kind, fields)

    async def channel(self) -> Channel:
        """The open channel, opened again if need be."""
        if self._closed:
            raise gone(self.home.id, "closed")
        channel = self._channel
        if channel is None or not channel.open_now:
            async with self._opening:
                if self._channel is None or not self._channel.open_now:
                    if self.home.path.exists() and self.home.read().attach_epoch > self.record.attach_epoch:
                        raise StaleEpoch(
                            f"another process drives sandbox {self.home.id} now; this one may no longer act on it. "
                            "Sandbox.connect(id, takeover=True) would take it back."
                        )
                    await self.open(within_s=10.0)
        assert self._channel is not None
        return self._channel

    async def request(self, kind: Type, fields: list[tuple[Tag, Value]] | None = None, *, again: bool = True) -> Fields:
        """Ask the agent; with `again` (for what may be asked twice) a broken connection is mended once.

        Raises: AgentRefusal, TransportError, StaleEpoch, Gone.
        """
        channel = await self.channel()
        try:
            return await self._bounded(channel, kind, fields)
        except TransportError as error:
            if not error.retryable:
                raise
            if kind == Type.WAIT:
                await self.until_going()
            if self._closed or (reason := self._over()) is not None:
                raise gone(self.home.id, "closed" if self._closed else str(reason)) from error
            if not again:
                await asyncio.sleep(0.05)  # a dying sandbox's note may be a moment late
                if (reason := self._over()) is not None:
                    raise gone(self.home.id, reason) from error
                raise
        return await self._bounded(await self.channel(), kind, fields)

    async def until_going(self) -> None:
        """Returns once the sandbox does not stand still: one that was put aside has no processes, and comes back."""
        while not self._clock.going.is_set() and not self._closed:
            if self.home.ended() is not None or self.home.overdue() is not None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._clock.going.wait(), LOOK_S)

    async def _bounded(self, channel: Channel, kind: Type, fields: list[tuple[Tag, Value]] | None) -> Fields:
        """Nothing inside may make a caller wait for ever; what lasts as long as a command has bounds of its own."""
        try:
            return await asyncio.wait_for(channel.request(kind, fields), None if kind in _UNBOUNDED else PATIENCE_S)
        except TimeoutError as error:
            raise TransportError(
                f"the agent of sandbox {self.home.id} did not answer a {kind.name} within {PATIENCE_S:g} s: something "
                "inside keeps it from running. Close the sandbox.",
                retryable=False,
            ) from error

    async def close(self, *, for_good: bool = False) -> None:
        """Close the channel; `for_good`: no request opens it again."""
        self._closed = for_good
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
