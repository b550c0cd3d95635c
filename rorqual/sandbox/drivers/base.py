"""What every substrate must be able to do; the SDK knows nothing else of them.

A driver starts the guest agent inside its substrate and hands out a byte stream to it. Commands, files and terminals go
over that stream and are the same everywhere; pause, snapshot and stop are the driver's own.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rorqual.sandbox.spec import Capabilities, Kind, SandboxSpec


@dataclass(frozen=True)
class Process:
    """A host process, told apart from a later one with the same number by its start time (clock ticks since boot)."""

    pid: int
    start_time: int


@dataclass
class Running:
    """A started substrate, as much as another process needs to adopt it; kept as JSON in the sandbox's folder.

    processes: every host process of it, the keeper first. mounts, cgroups: host-side leftovers that `stop` removes.
    channel: how to reach the agent, e.g. {"unix": "channel.sock"} or {"fifo": ["in", "out"]}, relative to the folder.
    secret: key of the message codes (hex, 32 bytes). enforced: limit -> mechanism.
    extra: the driver's own; of it the SDK reads what the agent is to be told: nproc (processes, default the limit; 0
    none), data_limit_mb (per process, default none), cpu_locked (commands may not choose processors), filter (default
    true).
    """

    processes: list[Process]
    channel: dict[str, Any]
    secret: str
    mounts: list[str] = field(default_factory=list)
    cgroups: list[str] = field(default_factory=list)
    enforced: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Driver(ABC):
    """One way to run one kind of sandbox on this machine."""

    kind: ClassVar[Kind]
    name: ClassVar[str]
    probe_timeout_s: ClassVar[float] = 10.0

    @abstractmethod
    def missing(self) -> str | None:
        """What plainly lacks here (a binary, a device, a permission) with what would bring it, or None. Cheap."""

    def explain(self, why: str) -> str:
        """Why a command could not be run through it: what is known of this machine, else what was seen (`why`)."""
        return why

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this driver can do on this machine."""

    @abstractmethod
    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        """Start the substrate with the agent in it; `home` is the sandbox's own folder on the host.

        Returns once processes run; the caller then opens the channel and waits for the agent's hello.
        Raises: SandboxError (nothing is left behind) when it cannot; Unsupported for a constraint it cannot keep.
        """

    async def check(self, spec: SandboxSpec, home: Path) -> None:
        """Whether what `spec` names is all there and can be stood on, before anything is stopped for its sake.

        Raises: SandboxError for a layer or file that is missing or damaged; Unsupported for too many of them.
        """
        return None

    @abstractmethod
    async def connect(self, running: Running, home: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to the agent; may be called again by another process after the first one died."""

    @abstractmethod
    async def stop(self, running: Running, home: Path) -> list[str]:
        """End every process and remove every mount and cgroup; returns what could not be removed (empty: all gone)."""

    async def pause(self, running: Running, home: Path, keep_memory: bool) -> None:
        """Stop the clock of everything inside. Raises: Unsupported."""
        raise self._cannot("pause_memory", "pause")

    async def resume(self, running: Running, home: Path) -> Running:
        """Let it run on; a driver that gave the memory back starts new processes and returns them.

        It writes those into the sandbox's record itself, before they run and the saved memory is given up.
        """
        raise self._cannot("pause_memory", "resume")

    async def settle(self, running: Running, home: Path) -> Literal["ready", "paused"]:
        """What became of a sandbox whose record says that it is ready, but whose client may have died in the middle of
        pausing, resuming or copying it. What can run on does so.
        """
        return "ready"

    async def snapshot_disk(self, running: Running, home: Path) -> str:
        """Pack what was written since the start into a layer of the store; returns its digest. Raises: Unsupported."""
        raise self._cannot("snapshot_disk", "take a disk snapshot")

    async def snapshot_full(self, running: Running, home: Path, name: Callable[[str], Awaitable[None]]) -> None:
        """Store files and memory; `name` is awaited with the id of the pair before a collector may take it.

        Raises: Unsupported; SnapshotFailed; what `name` raises. Nothing is kept then.
        """
        raise self._cannot("snapshot_memory", "take a full snapshot")

    async def oom_kills(self, running: Running, home: Path) -> int:
        """How many processes were ended so far because the sandbox's memory was used up; 0 where nobody counts."""
        return 0

    async def memory_bytes(self, running: Running) -> int:
        """Host memory this sandbox takes now (its cgroup's, or the PSS of its processes)."""
        raise self._cannot("metrics", "tell its memory")

    def _cannot(self, capability: str, what: str) -> Exception:
        from rorqual.sandbox.errors import Unsupported

        return Unsupported(
            f"the {self.name} driver of {self.kind} sandboxes cannot {what} here; "
            "`rorqual sandbox doctor` lists drivers that can.",
            capability,
        )
