"""`Sandbox`: the same as `AsyncSandbox` without await.

Both share one implementation: the asynchronous one runs on a background event loop, one thread for the whole process,
and these methods wait for it. Callbacks run in the caller's own thread. Inside a running event loop they would block
it, so they refuse; use AsyncSandbox there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.functions import FunctionResult
from rorqual.sandbox.spec import Info, Isolation, Kind, Snapshot
from rorqual.sandbox.sync_loop import wait_for
from rorqual.sandbox.sync_rooms import Commands, Files, Ports, PtyFactory


class Sandbox:
    """One sandbox, driven by this process. Make one with `create` or `connect`; use it as a context manager.

    >>> with Sandbox.create("container") as sandbox:
    ...     sandbox.commands.run("echo hello").stdout
    'hello\\n'
    """

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox
        self.commands = Commands(sandbox)
        self.files = Files(sandbox)
        self.pty = PtyFactory(sandbox)
        self.ports = Ports(sandbox)

    @classmethod
    def create(
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
    ) -> Sandbox:
        """A new sandbox, ready for commands; see AsyncSandbox.create."""
        return cls(
            wait_for(
                AsyncSandbox.create(
                    kind,
                    image=image,
                    layers=layers,
                    snapshot=snapshot,
                    cpu=cpu,
                    memory_mb=memory_mb,
                    disk_mb=disk_mb,
                    pids=pids,
                    network=network,
                    env=env,
                    user=user,
                    cwd=cwd,
                    create_timeout=create_timeout,
                    idle_ttl=idle_ttl,
                    max_lifetime=max_lifetime,
                    paused_ttl=paused_ttl,
                    driver=driver,
                    min_isolation=min_isolation,
                    metadata=metadata,
                    home=home,
                )
            )
        )

    @classmethod
    def connect(cls, sandbox_id: str, *, takeover: bool = False, home: str | Path | None = None) -> Sandbox:
        """Drive a sandbox that another process made; see AsyncSandbox.connect."""
        return cls(wait_for(AsyncSandbox.connect(sandbox_id, takeover=takeover, home=home)))

    @classmethod
    def list(
        cls, *, metadata: Mapping[str, str] | None = None, state: str | None = None, home: str | Path | None = None
    ) -> list[Info]:
        """Sandboxes of this user that live."""
        return wait_for(AsyncSandbox.list(metadata=metadata, state=state, home=home))

    @classmethod
    def end(cls, sandbox_id: str, *, home: str | Path | None = None) -> None:
        """Kill a sandbox by id, whoever drives it; fine if it is gone already."""
        wait_for(AsyncSandbox.end(sandbox_id, home=home))

    @property
    def id(self) -> str:
        """Its name, by which other processes find it."""
        return self._sandbox.id

    @property
    def kind(self) -> Kind:
        """function, container, microvm or vm."""
        return self._sandbox.kind

    def info(self) -> Info:
        """State, driver, isolation, and what holds each limit."""
        return wait_for(self._sandbox.info())

    def metrics(self) -> dict[str, float]:
        """Host memory, running commands, seconds idle and paused."""
        return wait_for(self._sandbox.metrics())

    def ping(self) -> None:
        """Returns when the agent inside answers."""
        wait_for(self._sandbox.ping())

    def history(self, since: int = 0) -> Entries:
        """Entries of its log after number `since`."""
        return wait_for(self._sandbox.history(since))

    def call(
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
        """Run Python in a fresh fork of a warm interpreter inside; see AsyncSandbox.call."""
        return wait_for(
            self._sandbox.call(source, entry, args, kwargs, timeout=timeout, max_output=max_output, call=call)
        )

    def pause(self, keep_memory: bool = True) -> None:
        """Stop everything inside where it is."""
        wait_for(self._sandbox.pause(keep_memory))

    def resume(self) -> None:
        """Let it run on."""
        wait_for(self._sandbox.resume())

    def set_ttl(
        self, idle: float | None = None, max_lifetime: float | None = None, paused: float | None = None
    ) -> None:
        """Change times."""
        wait_for(self._sandbox.set_ttl(idle, max_lifetime, paused))

    def snapshot(self, kind: Literal["disk", "full"] = "disk", name: str | None = None) -> Snapshot:
        """Store its files, or files and memory."""
        return wait_for(self._sandbox.snapshot(kind, name))

    def fork(self, n: int = 1) -> Sandboxes:
        """`n` new sandboxes with the files as they are now."""
        return [Sandbox(one) for one in wait_for(self._sandbox.fork(n))]

    def rollback(self, snapshot: str | Snapshot) -> None:
        """Back to the files of a snapshot."""
        wait_for(self._sandbox.rollback(snapshot))

    def close(self) -> None:
        """End it; fine to call again."""
        wait_for(self._sandbox.close())

    kill = close

    def detach(self) -> None:
        """Let go of it without ending it."""
        wait_for(self._sandbox.detach())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sandbox._ended is None:
            self.close()

    def __repr__(self) -> str:
        return repr(self._sandbox).replace("AsyncSandbox", "Sandbox")


Entries = list[dict[str, Any]]  # `list` is a method of the class above
Sandboxes = list[Sandbox]
