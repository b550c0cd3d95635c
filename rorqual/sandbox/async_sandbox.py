"""`AsyncSandbox`: create, use and end a sandbox, of whichever kind.

State in short: preparing -> ready <-> paused -> gone. `(id, incarnation, attach_epoch)` tells what one talks to: the
incarnation grows when the processes were built anew (rollback), the epoch when another process takes over; the agent
itself refuses an older epoch, so a client that hung and woke up again cannot act.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import SandboxError
from rorqual.sandbox import bases, snapshots
from rorqual.sandbox import history as trajectory
from rorqual.sandbox.clock import RunningClock
from rorqual.sandbox.commands import Commands
from rorqual.sandbox.drivers import driver as driver_named
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.errors import Gone, StaleEpoch
from rorqual.sandbox.files import Files
from rorqual.sandbox.functions import FunctionResult, Functions
from rorqual.sandbox.history import History
from rorqual.sandbox.home import Home, Record, all_homes, gone
from rorqual.sandbox.link import Link, milliseconds
from rorqual.sandbox.ports import Ports
from rorqual.sandbox.probe import choose
from rorqual.sandbox.pty import PtyFactory
from rorqual.sandbox.spec import KINDS, Info, Isolation, Kind, Lifetimes, Limits, SandboxSpec, Snapshot
from rorqual.sandbox.sweep import end_home, sweep
from rorqual.sandbox.threads import in_thread
from rorqual.sandbox.wire import Fields, Tag, Type, Value

RETURN_S = 5.0
PAUSING_S, SAVING_S = 10.0, 60.0
"""How much longer than its paused_ttl a sandbox may stand still whose client died while it paused or saved it."""
Infos = list[Info]  # `list` is a method of the class below
Entries = list[dict[str, Any]]
Asked = list[tuple[Tag, Value]]
Sandboxes = list["AsyncSandbox"]


class AsyncSandbox:
    """One sandbox, driven by this process. Make one with `create` or `connect`; use it as an async context manager."""

    def __init__(self, home: Home, record: Record, driver: Driver) -> None:
        self._home = home
        self._record = record
        self._driver = driver
        self._clock = RunningClock()
        self._link = Link(driver, home, record, self._clock)
        self._log: History | None = None
        self._changing = asyncio.Lock()
        self._call_locks: dict[str, asyncio.Lock] = {}
        self._oom_seen = 0
        self._ended: str | None = None
        self.commands = Commands(self)
        self.files = Files(self)
        self.pty = PtyFactory(self)
        self.ports = Ports(self)
        self._functions = Functions(self)

    # --- making and finding

    @classmethod
    async def create(
        cls,
        kind: Kind = "container",
        *,
        image: str | None = None,
        layers: Sequence[str] = (),
        snapshot: str | Snapshot | None = None,
        cpu: float = 1.0,
        memory_mb: int = 512,
        disk_mb: int = 1024,
        pids: int = 256,
        network: str | Sequence[str] = "none",
        env: Mapping[str, str] | None = None,
        user: str = "agent",
        cwd: str | None = None,
        create_timeout: float = 60.0,
        idle_ttl: float = 300.0,
        max_lifetime: float = 3600.0,
        paused_ttl: float = 86400.0,
        driver: str | None = None,
        min_isolation: Isolation | None = None,
        metadata: Mapping[str, str] | None = None,
        home: str | Path | None = None,
    ) -> AsyncSandbox:
        """A new sandbox, ready for commands.

        image, layers: what its root is stacked from, or snapshot, which has these in it; without any of them it shows
        this machine's /usr, read-only.
        cpu: cores; memory_mb, disk_mb: MiB; pids: processes and threads. idle_ttl: seconds without commands, files or
        terminal input; max_lifetime: seconds in all; paused_ttl: seconds paused; float("inf") for none. network: "none"
        or names of what may be reached. min_isolation: refuse a driver that isolates less. home: another data folder.
        Raises: Unsupported, CapacityRejected, SandboxError; nothing is left behind then.
        """
        if kind not in KINDS:
            raise SandboxError(f"there is no kind of sandbox {kind!r}. Kinds: {', '.join(KINDS)}.")
        if snapshot is not None and (image is not None or layers):
            raise SandboxError(
                f"{f'image={image!r}' if image is not None else 'layers='} and snapshot= cannot be given together: a "
                "snapshot has the layers below it in it. Leave one of them out."
            )
        limits = Limits(cpu=cpu, memory_mb=memory_mb, disk_mb=disk_mb, pids=pids)
        _check(limits, env or {})
        spec = SandboxSpec(
            kind=kind,
            image=image,
            layers=tuple(layers),
            snapshot=snapshot.id if isinstance(snapshot, Snapshot) else snapshot,
            limits=limits,
            lifetimes=Lifetimes(idle_ttl, max_lifetime, paused_ttl),
            network=network if isinstance(network, str) else list(network),
            env=dict(env or {}),
            user=user,
            cwd=cwd,
            driver=driver,
            min_isolation=min_isolation,
            metadata=dict(metadata or {}),
        )
        chosen = await choose(kind, driver, min_isolation)
        await asyncio.to_thread(sweep, home)
        place = await in_thread(Home.make, kind, home, undo=lambda made: made.remove("closed"))
        record = Record(place.id, chosen.name, spec, time.time(), owner=os.getpid())
        sandbox = cls(place, record, chosen)
        try:
            place.write(record)
            place.set_deadlines({"lifetime": max_lifetime})
            await sandbox._start(create_timeout)
            sandbox._log = await in_thread(
                History, place.path / "history", is_stale=sandbox._is_stale, undo=History.close
            )
            about = {"sandbox": kind, "driver": chosen.name, "incarnation": 1, "snapshot": spec.snapshot}
            await sandbox._log.write("create", about)
            if kind == "function":
                await sandbox._functions.warm()
        except BaseException:
            await asyncio.shield(sandbox._undo())
            raise
        return sandbox

    async def _start(self, timeout: float) -> None:
        """Start the driver and claim its agent; the record is on disk before the agent is told the secret."""
        end = time.monotonic() + timeout
        try:
            self._record.running = await asyncio.wait_for(
                self._driver.start(self._record.spec, self._home.path), timeout
            )
            self._home.write(self._record)
            await self._link.open(within_s=max(0.1, end - time.monotonic()), first=True)
        except (TimeoutError, Gone) as error:
            said = _last_words(self._home.path)
            raise SandboxError(
                f"the {self._driver.name} driver did not bring up a {self._record.spec.kind} sandbox within "
                f"{timeout:g} s{f': {said}' if said else ''}. `rorqual sandbox doctor` checks this machine."
            ) from error
        self._record.state = "ready"
        self._home.write(self._record)

    async def _undo(self) -> None:
        await self._link.close(for_good=True)
        if self._log is not None:
            self._log.discard()
        with contextlib.suppress(SandboxError):
            await end_home(self._home, "closed", self._driver, self._record.running)
        self._home.unlock()  # what could not be ended is left to a sweep

    @classmethod
    async def connect(cls, sandbox_id: str, *, takeover: bool = False, home: str | Path | None = None) -> AsyncSandbox:
        """Drive a sandbox that another process made, once that one let go of it or died.

        takeover: also while it lives; what it tries from then on fails there with StaleEpoch.
        Raises: Gone; SandboxError when another process drives it.
        """
        place = Home.find(sandbox_id, home)
        reason = place.ended()
        if reason is not None:
            await asyncio.to_thread(sweep, place.base)
            raise gone(sandbox_id, reason)
        held = place.lock()
        for _ in range(0 if takeover else 20):  # a sweep that looks at it holds the lock for a moment
            if held:
                break
            await asyncio.sleep(0.01)
            held = place.lock()
        if not held and not takeover:
            raise SandboxError(
                f"process {place.read().owner} drives sandbox {sandbox_id}. Close it there, or connect with "
                "takeover=True, which fences that process off."
            )
        try:
            with place.editing() as record:
                if record.running is None:  # its maker died in the middle
                    raise gone(sandbox_id, "crashed")
                if not held:
                    place.take_lock()
                record.attach_epoch += 1
                record.owner = os.getpid()
        except BaseException:
            place.unlock()
            raise
        sandbox = cls(place, record, driver_named(record.spec.kind, record.driver))
        try:
            if record.state == "ready" and await sandbox._driver.settle(sandbox._link.running, place.path) == "paused":
                sandbox._set_state("paused")  # the client before died when its memory was on the disk already
                sandbox._deadlines(record.spec.lifetimes.paused_ttl)
            if record.state != "paused":
                await sandbox._link.open(within_s=RETURN_S)
                await sandbox._settle()
                sandbox._deadlines(None)  # the client before may have died while it paused or resumed it
            sandbox._log = await in_thread(sandbox._open_history, not held, undo=History.close)
            await sandbox._log.write("attach", {"epoch": record.attach_epoch, "incarnation": record.incarnation})
        except BaseException:
            await sandbox._link.close(for_good=True)
            place.unlock()
            raise
        if record.state == "paused":
            sandbox._clock.stop()
        return sandbox

    def _open_history(self, take_over: bool) -> History:
        """Its log, for the holder of the highest epoch alone: of several takers the last is the log's writer, too."""
        with self._home.editing() as record:
            if record.attach_epoch > self._record.attach_epoch:
                raise StaleEpoch(f"another process drives sandbox {self.id} now; this one may no longer act on it.")
            return History(self._home.path / "history", take_over=take_over, is_stale=self._is_stale)

    async def _settle(self) -> None:
        """What a client that died in the middle of pausing or resuming left."""
        fields = await self._link.request(Type.PING)
        if fields.text(Tag.STATE) == "paused":
            await self._link.request(Type.RESUME)
        self._oom_seen = await self._driver.oom_kills(self._link.running, self._home.path)

    @classmethod
    async def list(
        cls, *, metadata: Mapping[str, str] | None = None, state: str | None = None, home: str | Path | None = None
    ) -> Infos:
        """Sandboxes of this user that live, whoever drives them and in whichever folder. Looking changes nothing."""
        found = []
        for place in [one for base in ([home] if home is not None else bases.known()) for one in all_homes(base)]:
            try:
                record = place.read()
            except (Gone, ValueError, KeyError, TypeError):
                continue
            if place.ended() is not None or record.state == "preparing":
                continue
            info = _info(record, driver_named(record.spec.kind, record.driver))
            if state not in (None, info.state):
                continue
            if all(info.metadata.get(name) == value for name, value in (metadata or {}).items()):
                found.append(info)
        return found

    @classmethod
    async def end(cls, sandbox_id: str, *, home: str | Path | None = None) -> None:
        """Kill a sandbox by id, whoever drives it; fine if it is gone already. Raises: SandboxError with leftovers."""
        try:
            place = Home.find(sandbox_id, home)
        except Gone:
            return
        await end_home(place, "closed")

    # --- what it is

    @property
    def id(self) -> str:
        """Its name, by which other processes find it."""
        return self._record.id

    @property
    def kind(self) -> Kind:
        """function, container, microvm or vm."""
        return self._record.spec.kind

    async def info(self) -> Info:
        """State, driver, isolation, and what holds each limit. Raises: Gone."""
        self._alive()
        return _info(self._record, self._driver)

    async def metrics(self) -> dict[str, float]:
        """Host memory, running commands, seconds idle and paused. Looking does not count as use."""
        self._alive()
        values: dict[str, float] = {
            "memory_bytes": float(await self._driver.memory_bytes(self._link.running)),
            "age_s": time.time() - self._record.created,
        }
        if self._record.state != "paused":
            fields = await self._link.request(Type.PING)
            values["running_commands"] = float(fields.number(Tag.RUNNING))
            values["idle_s"] = fields.number(Tag.IDLE_FOR_MS) / 1000
            values["paused_s"] = fields.number(Tag.PAUSED_US) / 1e6
        return values

    async def ping(self) -> None:
        """Returns when the agent inside answers. Looking does not count as use. Raises: Gone, TransportError."""
        self._alive()
        if self._record.state != "paused":
            await self._link.request(Type.PING)

    async def history(self, since: int = 0) -> Entries:
        """Entries of its log after number `since`, oldest first."""
        self._alive()
        if self._log is not None:
            await asyncio.to_thread(self._log._journal.commit)
        return await asyncio.to_thread(trajectory.read, self._home.path / "history", since)

    async def call(
        self,
        source: str,
        entry: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = 60.0,
        max_output: int = 1 << 20,
        call: str | None = None,
    ) -> FunctionResult:
        """Run Python `source` in a fresh fork of a warm interpreter inside, then its function `entry` with JSON values.

        timeout: seconds, after which it and all it started are killed. call: a key, as in commands.run.
        Raises: SandboxError when there is no Python inside; OutcomeUnknown, ReplayDivergence (call=...). What the code
        itself raises is in the result.
        """
        if self._record.state == "paused":
            await self.resume()
        return await self._functions.call(source, entry, args, kwargs or {}, timeout, max_output, call)

    # --- requests of the parts

    def _history(self) -> History:
        assert self._log is not None
        return self._log

    def _is_stale(self) -> bool:
        """Whether another process took over."""
        try:
            return self._home.read().attach_epoch > self._record.attach_epoch
        except Gone:
            return False

    def _alive(self) -> None:
        if self._ended is not None:
            raise gone(self.id, self._ended)
        reason = self._home.ended()
        if reason is not None:
            raise gone(self.id, reason)

    @contextlib.asynccontextmanager
    async def _calling(self, key: str | None) -> AsyncIterator[None]:
        """One call of a key at a time; a second asker waits and is answered from the record."""
        if self._ended is not None:
            raise gone(self.id, self._ended)
        if key is None:
            yield
            return
        lock = self._call_locks.setdefault(key, asyncio.Lock())
        async with lock:
            yield

    async def _ask(self, kind: Type, fields: Asked | None = None, *, again: bool = True, wake: bool = True) -> Fields:
        if self._record.state == "paused":
            if not wake:
                raise SandboxError(f"sandbox {self.id} is paused, and looking does not wake it. resume() first.")
            await self.resume()
        return await self._link.request(kind, fields, again=again)

    async def _new_oom_kills(self) -> bool:
        count = await self._driver.oom_kills(self._link.running, self._home.path)
        more = count > self._oom_seen
        self._oom_seen = count
        return more

    # --- pausing, times

    async def pause(self, keep_memory: bool = True) -> None:
        """Stop everything inside where it is, running commands and their clocks too; any later operation wakes it."""
        async with self._changing:
            self._alive()
            if self._record.state == "paused":
                return
            await self._history().write("pause", {"keep_memory": keep_memory})
            paused_ttl = self._record.spec.lifetimes.paused_ttl
            try:
                self._deadlines(paused_ttl + (PAUSING_S if keep_memory else SAVING_S))
                await self._link.request(Type.PAUSE)
                self._clock.stop()
                await self._driver.pause(self._link.running, self._home.path, keep_memory)
                self._set_state("paused")
                self._deadlines(paused_ttl)
            except BaseException:
                await asyncio.shield(self._break_off_pause())
                raise

    async def _break_off_pause(self) -> None:
        """After a pause that failed or was cancelled half-way: it runs on, unless its memory is on the disk already."""
        with contextlib.suppress(SandboxError):  # what failed first is what the caller is told
            if await self._driver.settle(self._link.running, self._home.path) == "paused":
                self._set_state("paused")
                return
            self._clock.go_on()
            await self._link.request(Type.RESUME)
            self._deadlines(None)

    async def resume(self) -> None:
        """Let it run on; fine if it runs already."""
        async with self._changing:
            if self._record.state != "paused":
                return
            self._alive()
            if self._is_stale():
                raise StaleEpoch(f"another process drives sandbox {self.id} now; this one may no longer act on it.")
            before = self._record.running
            self._record.running = await self._driver.resume(self._link.running, self._home.path)
            if self._record.running != before:
                await self._link.close()
            await self._link.request(Type.RESUME)
            self._clock.go_on()
            self._set_state("ready")  # last: broken off at any step before, it is paused still and can be resumed again
            self._deadlines(None)
            await self._history().write("resume", {"incarnation": self._record.incarnation})

    def _set_state(self, state: str) -> None:
        with self._home.editing() as record:
            if record.attach_epoch > self._record.attach_epoch:
                raise StaleEpoch(f"another process drives sandbox {self.id} now; this one may no longer act on it.")
            record.state, record.running, record.spec = state, self._record.running, self._record.spec
            record.incarnation = self._record.incarnation
        self._record.state = state

    def _deadlines(self, paused: float | None) -> None:
        left = self._record.created + self._record.spec.lifetimes.max_lifetime - time.time()
        deadlines = {"lifetime": left}
        if paused is not None:
            deadlines["paused"] = paused
        self._home.set_deadlines(deadlines, self._link.running)

    async def set_ttl(
        self, idle: float | None = None, max_lifetime: float | None = None, paused: float | None = None
    ) -> None:
        """Change times, in seconds: without use from now on, in all since creation, paused. What is not named stays."""
        self._alive()
        old = self._record.spec.lifetimes
        new = Lifetimes(
            old.idle_ttl if idle is None else idle,
            old.max_lifetime if max_lifetime is None else max_lifetime,
            old.paused_ttl if paused is None else paused,
        )
        self._record.spec = replace(self._record.spec, lifetimes=new)
        self._set_state(self._record.state)
        is_paused = self._record.state == "paused"
        if not is_paused:
            fields: Asked = [(Tag.IDLE_MS, milliseconds(new.idle_ttl))]
            await self._link.request(Type.SET_TTL, [*fields, (Tag.LIFE_MS, milliseconds(new.max_lifetime))])
        self._deadlines(new.paused_ttl if is_paused else None)

    # --- snapshots

    async def snapshot(self, kind: Literal["disk", "full"] = "disk", name: str | None = None) -> Snapshot:
        """Store its files ("disk"), or files and memory ("full"); durable and verified when this returns.

        name: keeps it after this sandbox is gone, until it is removed by that name.
        Raises: Unsupported; SnapshotFailed (the snapshots before still stand).
        """
        async with self._changing:
            self._alive()
            return await snapshots.take(self, kind, name)

    async def fork(self, n: int = 1) -> Sandboxes:
        """`n` new sandboxes with the files as they are now; processes and memory are not copied."""
        async with self._changing:
            self._alive()
            taken = await snapshots.take(self, "disk", None)
        return await snapshots.fork(self, taken, n)

    async def rollback(self, snapshot: str | Snapshot) -> None:
        """Back to the files of a snapshot: same id, next incarnation; processes end, later calls count as not made."""
        async with self._changing:
            self._alive()
            await snapshots.roll_back(self, snapshot)

    # --- ends

    async def close(self) -> None:
        """End it: processes, mounts, groups and files are gone when this returns. Fine to call again.

        Raises: SandboxError listing what could not be removed; calling again tries again.
        """
        async with self._changing:
            if self._ended is not None:
                return
            await self.ports.close()
            await self._link.close(for_good=True)
            if self._log is not None:
                self._log.discard()
            if self._is_stale():
                self._home.unlock()
                self._ended = "closed"
                raise StaleEpoch(f"another process drives sandbox {self.id} now; it was left alone.")
            await end_home(self._home, "closed", self._driver, self._record.running)
            self._ended = "closed"

    kill = close

    async def detach(self) -> None:
        """Let go of it without ending it: its commands go on and another process may connect."""
        try:
            await self.ports.close()
            await self._link.close(for_good=True)
            if self._log is not None:
                await asyncio.to_thread(self._log.close)
        finally:
            self._home.unlock()
            self._ended = "detached"

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._ended is None:
            await self.close()

    def __repr__(self) -> str:
        return f"<AsyncSandbox {self.id} {self._record.driver} {self._ended or self._record.state}>"


def _check(limits: Limits, env: Mapping[str, str]) -> None:
    for name, value, least in (
        ("cpu", limits.cpu, 0.01),
        ("memory_mb", limits.memory_mb, 16),
        ("disk_mb", limits.disk_mb, 1),
        ("pids", limits.pids, 4),
    ):
        if value < least:
            raise SandboxError(f"{name}={value} is too little for any command. Ask for at least {least}.")
    for name, text in env.items():
        if not name or "=" in name or "\0" in name + text:
            raise SandboxError(f"{name!r} cannot be the name of an environment variable, or its value has a zero byte.")


def _info(record: Record, driver: Driver) -> Info:
    spec, capabilities = record.spec, driver.capabilities()
    return Info(
        id=record.id,
        kind=spec.kind,
        driver=record.driver,
        isolation=capabilities.isolation,
        state=record.state,
        limits=spec.limits,
        enforced=dict(record.running.enforced) if record.running else {},
        network=spec.network if isinstance(spec.network, str) else ", ".join(spec.network),
        capabilities=capabilities,
        incarnation=record.incarnation,
        attach_epoch=record.attach_epoch,
        created=record.created,
        metadata=spec.metadata,
    )


def _last_words(folder: Path) -> str:
    try:
        return (folder / "keeper.log").read_text(errors="replace").strip()[-500:]
    except OSError:
        return ""
