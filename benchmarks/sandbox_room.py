"""A bounded amount of memory for this process and every sandbox it starts, and what else may run out before it."""

import contextlib
import os
import resource
from pathlib import Path
from types import TracebackType

from sandbox_runtimes import available_bytes

from rorqual.sandbox import cgroups

SPARE_FILES, SPARE_PIDS = 256, 2000
"""Open files and processes that are left to this process and to the rest of the machine."""


class Room:
    """`size` bytes, held by a control group where one can be made. Use it as a context manager.

    how: in words, what measures and bounds it. The sandboxes' own groups are made below it meanwhile.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.how = "MemAvailable: no control group could be made"
        self._parent = cgroups.PARENT
        self._folder: Path | None = None
        self._home: Path | None = None
        self._available = 0

    def __enter__(self) -> "Room":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._available = available_bytes()
        top, version = _memory_hierarchy()
        if top is None:
            return self
        cgroups.PARENT = f"{self._parent}-room-{os.getpid()}"
        self._folder = top / cgroups.PARENT
        client = self._folder / "client"
        self._folder.mkdir()
        (self._folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(self.size))
        if version == 2:
            (self._folder / "cgroup.subtree_control").write_text("+memory +cpu +pids")
        client.mkdir()
        self._home = top / _own_group(version).lstrip("/")
        (client / "cgroup.procs").write_text(str(os.getpid()))
        self.how = f"cgroup v{version}, limit {self.size} bytes"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None and self._home is not None:
            (self._home / "cgroup.procs").write_text(str(os.getpid()))
            (self._folder / "client").rmdir()
            self._folder.rmdir()
        cgroups.PARENT = self._parent

    def used_bytes(self) -> int:
        """What is taken of it and could not be had back by dropping file pages that nobody has mapped."""
        if self._folder is None:
            return self.shrunk_bytes()
        fields = dict(line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
        if (self._folder / "memory.current").exists():
            usage, prefix, mapped = int((self._folder / "memory.current").read_text()), "", "file_mapped"
        else:
            usage, prefix = int((self._folder / "memory.usage_in_bytes").read_text()), "total_"
            mapped = "total_mapped_file"
        file_pages = int(fields[f"{prefix}inactive_file"]) + int(fields[f"{prefix}active_file"])
        return usage - file_pages + min(file_pages, int(fields[mapped]))

    def counts(self) -> dict[str, int]:
        """Processes and threads of the machine, and files that this process has open."""
        processes = threads = 0
        for path in Path("/proc").glob("[0-9]*/task"):
            with contextlib.suppress(OSError):
                threads += len(os.listdir(path))
                processes += 1
        return {"host_processes": processes, "host_threads": threads, "open_files": len(os.listdir("/proc/self/fd"))}

    def shrunk_bytes(self) -> int:
        """By how much the memory that others could get has shrunk since the room was entered, whoever took it."""
        return self._available - available_bytes()

    def reached(self) -> str | None:
        """Which other limit is near, or None."""
        counts = self.counts()
        if counts["open_files"] + SPARE_FILES > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            return f"open files of one client ({counts['open_files']})"
        if counts["host_threads"] + SPARE_PIDS > int(Path("/proc/sys/kernel/pid_max").read_text()):
            return f"processes of the machine ({counts['host_threads']} threads of pid_max)"
        return None


def _memory_hierarchy() -> tuple[Path | None, int]:
    """Where groups with a memory limit can be made, as `cgroups` finds it, and the version."""
    folders, _ = cgroups._place_v1()
    if folders:
        return folders["memory"], 1
    top, _ = cgroups._place_v2()
    return top, 2


def _own_group(version: int) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if ("memory" in controllers.split(",")) if version == 1 else number == "0":
            return path
    raise SystemExit("/proc/self/cgroup does not say which group this process is in")
