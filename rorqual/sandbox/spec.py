"""What a caller asks of a sandbox, what a driver can do, and what is in force: plain data, no behaviour.

Source: docs/sandbox.md; the fields follow the published names of DSec's client where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["function", "container", "microvm", "vm"]
KINDS: tuple[Kind, ...] = ("function", "container", "microvm", "vm")

Isolation = Literal["process", "namespace", "app-kernel", "vm-emulated", "vm-hw"]
ISOLATION_ORDER: tuple[Isolation, ...] = ("process", "namespace", "app-kernel", "vm-emulated", "vm-hw")
"""From weakest to strongest; `min_isolation` compares by this order."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one sandbox. All are enforced or the sandbox is refused; `Info.enforced` says by what.

    cpu: cores; memory_mb, disk_mb: MiB; pids: processes and threads; open_files, file_mb: per process.
    """

    cpu: float = 1.0
    memory_mb: int = 512
    disk_mb: int = 1024
    pids: int = 256
    open_files: int = 1024
    file_mb: int = 256
    inodes: int = 200_000


@dataclass(frozen=True)
class Lifetimes:
    """Seconds. idle_ttl: without commands, files or terminal input; max_lifetime: in all; paused_ttl: paused."""

    idle_ttl: float = 300.0
    max_lifetime: float = 3600.0
    paused_ttl: float = 86400.0


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do on this machine."""

    isolation: Isolation
    pause_memory: bool = False
    snapshot_disk: bool = False
    snapshot_memory: bool = False
    fork_live: bool = False
    pty: bool = True
    network_allowlist: bool = False
    disk_quota: bool = False


@dataclass(frozen=True)
class SandboxSpec:
    """One sandbox as asked for: everything a driver needs to start it."""

    kind: Kind
    image: str | None = None
    layers: tuple[str, ...] = ()
    snapshot: str | None = None
    limits: Limits = Limits()
    lifetimes: Lifetimes = Lifetimes()
    network: str | Sequence[str] = "none"
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = "agent"
    cwd: str | None = None
    driver: str | None = None
    min_isolation: Isolation | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandResult:
    """How a command ended.

    exit_code: its own, or 128 + signal; signal: the signal's number or None; timed_out, oom_killed: why it was killed.
    truncated_bytes: per stream, how many bytes of the middle were left out. duration_ms: paused time not counted;
    paused_ms: how long the sandbox stood still meanwhile.
    replayed: answered from the record, nothing ran. call_index, journal_seq: its place in the sandbox's history.
    """

    exit_code: int
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    signal: int | None = None
    timed_out: bool = False
    oom_killed: bool = False
    truncated_bytes: Mapping[str, int] = field(default_factory=lambda: {"stdout": 0, "stderr": 0})
    duration_ms: float = 0.0
    paused_ms: float = 0.0
    replayed: bool = False
    call_index: int | None = None
    journal_seq: int | None = None

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are no UTF-8 become U+FFFD."""
        return self.stdout_bytes.decode("utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are no UTF-8 become U+FFFD."""
        return self.stderr_bytes.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Info:
    """A sandbox as it is: state, driver, isolation, and the limits and policy that are really in force."""

    id: str
    kind: Kind
    driver: str
    isolation: Isolation
    state: str
    limits: Limits
    enforced: Mapping[str, str]
    """For each limit the mechanism that holds it, e.g. {"memory": "cgroup v1", "disk": "tmpfs size"}."""
    network: str
    capabilities: Capabilities
    incarnation: int
    attach_epoch: int
    created: float
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A stored state. kind: "disk" (files) or "full" (files and memory); history_seq: the call it comes after."""

    id: str
    kind: Literal["disk", "full"]
    digest: str
    size_bytes: int
    history_seq: int
    name: str | None = None
