"""Control groups: what holds a sandbox to its memory, processor and process limits, whichever version the host has.

Three places are known: version 1 controllers (also beside a version 2 tree that has none of them), a version 2 tree as
root, and the part of a version 2 tree that systemd hands to an ordinary user. Elsewhere `create` gives None and
`why_not` says what is missing. Groups lie in `rorqual/` at the top of what this process may write, so that another
process can find and remove them.

Source: docs/sandbox.md; the kernel's admin-guide on cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox.spec import Limits

PARENT = "rorqual"
NEEDED = ("memory", "pids", "cpu")
V1 = ("memory", "pids", "cpu", "cpuacct", "freezer", "devices")
PLAIN_DEVICES = (
    "c 1:3 rwm",  # null
    "c 1:5 rwm",  # zero
    "c 1:7 rwm",  # full
    "c 1:8 rwm",  # random
    "c 1:9 rwm",  # urandom
    "c 5:0 rwm",  # tty
    "c 5:2 rwm",  # ptmx
    "c 136:* rwm",  # terminals made by ptmx
)
"""All that code in a container may open, as rules of the version 1 `devices` controller."""
_PERIOD_US = 100_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy. version: 1 or 2; controllers: those bound to it; root: what of it is mounted here."""

    version: int
    path: Path
    root: str
    controllers: frozenset[str]


def _mounts() -> list[_Mount]:
    """Every control group hierarchy that this process sees; hidden ones (mounted over) count as the last one."""
    found: dict[Path, _Mount] = {}
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, path = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), text) for text in left.split()[3:5])
        if kind == "cgroup":
            found[Path(path)] = _Mount(1, Path(path), root, frozenset(options.split(",")))
        else:
            found[Path(path)] = _Mount(2, Path(path), root, frozenset(_words(Path(path) / "cgroup.controllers")))
    return list(found.values())


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _own(mount: _Mount) -> Path:
    """The folder of this process's own group in a version 2 hierarchy."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                inside = os.path.relpath(path, mount.root) if mount.root != "/" else path.lstrip("/")
                return mount.path if inside.startswith("..") else mount.path / inside
    return mount.path


def _writable(folder: Path) -> bool:
    return all(os.access(path, os.W_OK) for path in (folder, folder / "cgroup.procs"))


def _place_v1() -> tuple[dict[str, Path], str]:
    """Version 1: the folder to make groups in, for each controller; and why there is none."""
    folders = {
        name: mount.path for mount in _mounts() if mount.version == 1 for name in V1 if name in mount.controllers
    }
    if not all(name in folders for name in NEEDED):
        return {}, "no cgroup v1 hierarchy has the controllers memory, pids and cpu"
    shut = [str(path) for path in folders.values() if not _writable(path)]
    if shut:
        return {}, f"cgroup v1 lets only root make groups ({shut[0]} cannot be written by user {os.geteuid()})"
    return folders, ""


def _place_v2() -> tuple[Path | None, str]:
    """Version 2: the topmost folder this process may make groups with limits in; and why there is none."""
    mount = next((mount for mount in _mounts() if mount.version == 2), None)
    if mount is None:
        return None, "no cgroup v2 tree is mounted"
    own = _own(mount)
    inside = (folder for folder in (own, *own.parents) if folder.is_relative_to(mount.path))
    open_to_us = [f for f in inside if _writable(f) and os.access(f / "cgroup.subtree_control", os.W_OK)]
    if not open_to_us:
        return None, (
            f"this process's group {own} belongs to another user; start it with "
            "`systemd-run --user --scope -p Delegate=yes COMMAND`, or from a systemd user session"
        )
    top = open_to_us[-1]
    lacking = [name for name in NEEDED if name not in _words(top / "cgroup.controllers")]
    if lacking:
        return None, (
            f"{top} has no controller {', '.join(lacking)}; an administrator can hand it on with a drop-in "
            "/etc/systemd/system/user@.service.d/delegate.conf: [Service] Delegate=cpu memory pids"
        )
    try:
        (top / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in NEEDED))
    except OSError as error:
        return None, (
            f"{top} has processes of its own and cannot pass limits on ({error.strerror}); start in a group below it: "
            "`systemd-run --user --scope -p Delegate=yes COMMAND`"
        )
    return top, ""


def why_not() -> str | None:
    """Why no limits can be set with control groups here and what would help, or None when they can."""
    first, v1_reason = _place_v1()
    if first:
        return None
    if "only root" in v1_reason:
        return (
            f"{v1_reason}; a machine booted with systemd.unified_cgroup_hierarchy=1 has version 2, which systemd "
            "hands on to users"
        )
    second, v2_reason = _place_v2()
    return None if second else f"{v1_reason}; {v2_reason}"


def create(name: str, limits: Limits, *, devices: Sequence[str] | None = None) -> Group | None:
    """A new empty group holding its processes to `limits` (memory with swap 0, cpu, pids); None where that can't be.

    devices: rules of the version 1 `devices` controller for what may be opened (`PLAIN_DEVICES`); None: anything.
    Raises: SandboxError when there is such a group already, or the kernel refuses a limit (nothing is left then).
    """
    if not _NAME.fullmatch(name):
        raise SandboxError(f"{name!r} is no name for a control group. Use letters, digits, and - _ . after the first.")
    folders, _ = _place_v1()
    if folders:
        group = Group({name_: folder / PARENT / name for name_, folder in folders.items()}, version=1)
    else:
        top, _ = _place_v2()
        if top is None:
            return None
        group = Group({"": top / PARENT / name}, version=2)
    group._make(limits, devices)
    return group


def find(name: str) -> Group | None:
    """The group of this name that an earlier process made and perhaps had no time to write down, or None."""
    folders, _ = _place_v1()
    if folders:
        group = Group({name_: folder / PARENT / name for name_, folder in folders.items()}, version=1)
    else:
        top, _ = _place_v2()
        if top is None:
            return None
        group = Group({"": top / PARENT / name}, version=2)
    return group if any(Path(path).exists() for path in group.paths) else None


def adopt(paths: Sequence[str | os.PathLike[str]]) -> Group:
    """The group that an earlier process made, from its `paths`; it may be gone in part or wholly."""
    by_controller: dict[str, Path] = {}
    version = 1
    for path in map(Path, paths):
        inside = [mount for mount in _mounts() if path.is_relative_to(mount.path)]
        mount = max(inside, key=lambda mount: len(mount.path.parts), default=None)
        if mount is None or path.parent.name != PARENT:
            raise SandboxError(f"{path} is no control group of ours: it lies in no hierarchy's {PARENT}/ folder.")
        version = mount.version
        by_controller.update(
            {name: path for name in (V1 if version == 1 else ("",)) if version == 2 or name in mount.controllers}
        )
    return Group(by_controller, version=version)


class Group:
    """One sandbox's group: one folder in version 2, one for each hierarchy in version 1."""

    def __init__(self, folders: dict[str, Path], version: int) -> None:
        self._folders, self._version = folders, version
        self._enforced: dict[str, str] = {}

    @property
    def paths(self) -> list[str]:
        """The group's folders, to be kept for `adopt`."""
        return sorted({str(path) for path in self._folders.values()})

    @property
    def procs(self) -> list[Path]:
        """The files that a process enters the group by, writing "0" into each: before exec, so no child escapes."""
        return [Path(path) / "cgroup.procs" for path in self.paths]

    def describe(self) -> dict[str, str]:
        """Each limit in force and by what, e.g. {"memory": "cgroup v1 memory.limit_in_bytes"}."""
        return dict(self._enforced)

    def attach(self, pid: int) -> None:
        """Put a process in; its later children follow. Raises: SandboxError when it is gone or may not be moved."""
        for path in self.procs:
            try:
                path.write_text(str(pid))
            except OSError as error:
                raise SandboxError(f"process {pid} cannot be put into {path.parent}: {error.strerror}.") from error

    def pids(self) -> list[int]:
        """Every process inside, groups below included."""
        found: set[int] = set()
        for top in self.paths:
            for folder, _, _ in os.walk(top):
                found.update(map(int, _words(Path(folder) / "cgroup.procs")))
        return sorted(found)

    def memory_bytes(self) -> int:
        """Memory charged to the group now, page cache and tmpfs included."""
        return self._number("memory", "memory.usage_in_bytes", "memory.current")

    def peak_memory_bytes(self) -> int:
        """The most memory it ever had; 0 where the kernel does not keep it."""
        return self._number("memory", "memory.max_usage_in_bytes", "memory.peak")

    def cpu_seconds(self) -> float:
        """Processor time used by everything that ran in it."""
        if self._version == 1:
            return self._number("cpuacct", "cpuacct.usage", "") / 1e9
        return self._field("", "cpu.stat", "usage_usec") / 1e6

    def oom_kills(self) -> int:
        """How many processes the kernel killed because the group was at its memory limit."""
        if self._version == 2:
            return self._field("", "memory.events", "oom_kill")
        count = 0  # version 1 counts at the group of the process that was killed, which may be one below
        for folder, _, _ in os.walk(self._folders.get("memory", Path("/nowhere"))):
            words = _words(Path(folder) / "memory.oom_control")
            count += next((int(value) for key, value in _pairs(words) if key == "oom_kill"), 0)
        return count

    def freeze(self, timeout_s: float = 10.0) -> None:
        """Stop every process where it is. Raises: SandboxError when they do not stop in time (they run on then)."""
        if not self._set_frozen(True, timeout_s):
            self._set_frozen(False, timeout_s)
            raise SandboxError(
                f"the processes of {self.paths[0]} did not freeze in {timeout_s:g} s: one sits in an uninterruptible "
                "call. They run on; try again."
            )

    def thaw(self, timeout_s: float = 10.0) -> None:
        """Let a frozen group run on."""
        if not self._set_frozen(False, timeout_s):
            raise SandboxError(f"the processes of {self.paths[0]} did not thaw in {timeout_s:g} s. Kill the group.")

    def kill(self, timeout_s: float = 10.0) -> list[int]:
        """End every process, also one that forks as fast as it can; returns those still there (empty: none)."""
        deadline = time.monotonic() + timeout_s
        while left := self.pids():
            if time.monotonic() > deadline:
                return left
            if self._version == 2 and self._tell("cgroup.kill", "1"):
                time.sleep(0.002)
                continue
            self._set_frozen(True, 0.5)  # nothing can fork between the list and the signals
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._set_frozen(False, 0.5)
            time.sleep(0.002)
        return []

    def remove(self, timeout_s: float = 5.0) -> list[str]:
        """Delete the group, which must be empty; returns the folders that could not be (empty: all gone)."""
        deadline = time.monotonic() + timeout_s
        while left := [path for path in self.paths if not _remove_tree(Path(path))]:
            if time.monotonic() > deadline:
                return left
            time.sleep(0.01)
        for parent in {Path(path).parent for path in self.paths}:
            _drop_parent(parent)
        return []

    def _make(self, limits: Limits, devices: Sequence[str] | None) -> None:
        made: list[Path] = []
        try:
            for path in map(Path, self.paths):
                _make_folder(path, NEEDED if self._version == 2 else ())
                made.append(path)
        except OSError as error:
            for path in made:
                _remove_tree(path)
            if isinstance(error, FileExistsError):
                raise SandboxError(f"there is a control group {error.filename} already. Take another name.") from None
            raise SandboxError(f"no control group could be made: {error}.") from error
        try:
            (self._limit_v1 if self._version == 1 else self._limit_v2)(limits, devices)
        except OSError as error:
            self.remove()
            raise SandboxError(f"a limit could not be set: {error}. The kernel refuses {limits}.") from error

    def _limit_v1(self, limits: Limits, devices: Sequence[str] | None) -> None:
        memory = limits.memory_mb << 20
        self._put("memory", "memory.limit_in_bytes", memory, "memory")
        with suppress(FileNotFoundError):  # there only where swap is accounted
            self._put("memory", "memory.memsw.limit_in_bytes", memory, "swap")
        self._put("pids", "pids.max", limits.pids, "pids")
        self._put("cpu", "cpu.cfs_period_us", _PERIOD_US)
        self._put("cpu", "cpu.cfs_quota_us", max(1000, int(limits.cpu * _PERIOD_US)), "cpu")
        if devices is not None and "devices" in self._folders:
            self._put("devices", "devices.deny", "a", "devices")
            for rule in devices:
                self._put("devices", "devices.allow", rule)

    def _limit_v2(self, limits: Limits, devices: Sequence[str] | None) -> None:
        # version 2 has no devices controller but BPF programs; there the private /dev alone decides
        self._put("", "memory.max", limits.memory_mb << 20, "memory")
        with suppress(FileNotFoundError):
            self._put("", "memory.swap.max", 0, "swap")
        self._put("", "pids.max", limits.pids, "pids")
        self._put("", "cpu.max", f"{max(1000, int(limits.cpu * _PERIOD_US))} {_PERIOD_US}", "cpu")

    def _put(self, controller: str, file: str, value: int | str, limit: str | None = None) -> None:
        path = self._folders[controller] / file
        descriptor = os.open(path, os.O_WRONLY)  # never O_CREAT: a missing file is a missing feature
        try:
            os.write(descriptor, str(value).encode())
        finally:
            os.close(descriptor)
        if limit:
            self._enforced[limit] = f"cgroup v{self._version} {file}"

    def _tell(self, file: str, value: str) -> bool:
        try:
            self._put("", file, value)
        except OSError:
            return False
        return True

    def _number(self, controller: str, v1: str, v2: str) -> int:
        name, file = (controller, v1) if self._version == 1 else ("", v2)
        try:
            return int((self._folders[name] / file).read_text())
        except (OSError, KeyError, ValueError):
            return 0

    def _field(self, controller: str, file: str, field: str) -> int:
        words = _words(self._folders.get(controller if self._version == 1 else "", Path("/nowhere")) / file)
        return next((int(value) for key, value in _pairs(words) if key == field), 0)

    def _set_frozen(self, frozen: bool, timeout_s: float) -> bool:
        """Ask for it and wait until it is so; False when the time ran out or there is no freezer."""
        wanted = ("FROZEN" if frozen else "THAWED") if self._version == 1 else str(int(frozen))
        controller, file = ("freezer", "freezer.state") if self._version == 1 else ("", "cgroup.freeze")
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._put(controller, file, wanted)
                if self._version == 1:
                    reached = (self._folders[controller] / file).read_text().strip() == wanted
                else:
                    reached = self._field("", "cgroup.events", "frozen") == int(frozen)
            except FileNotFoundError:
                return True  # the group is gone
            except (OSError, KeyError):
                return False
            if reached or time.monotonic() > deadline:
                return reached
            time.sleep(0.001)


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words[::2], words[1::2], strict=False)


def _make_folder(path: Path, controllers: Sequence[str]) -> None:
    """The group's folder below the shared one, which another process may remove between our two steps."""
    for attempt in range(100):
        path.parent.mkdir(exist_ok=True)
        try:
            if controllers:
                (path.parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
            path.mkdir()
            return
        except FileNotFoundError:
            if attempt == 99:
                raise


def _remove_tree(top: Path) -> bool:
    """Whether the group and those below it are gone now."""
    for folder, _, _ in os.walk(top, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)
    return not top.exists()


def remove_everywhere(name: str) -> list[str]:
    """Delete the group of a sandbox in hierarchies that `create` does not use, where a runtime made one all the same.

    Returns the folders that could not be removed.
    """
    left = []
    for mount in _mounts():
        folder = mount.path / PARENT / name
        if folder.exists() and not _remove_tree(folder):
            left.append(str(folder))
        elif folder.parent.exists():
            _drop_parent(folder.parent)
    return left


@contextmanager
def parent_held() -> Iterator[list[int]]:
    """Handles (one, or none where no hierarchy is seen) that keep others from removing the shared folder while they are
    open, here or in a process that inherits them.

    For a runtime that makes groups below the folder by itself: it does so in several steps, in hierarchies that
    `create` may not use, where the folder is empty and would go with somebody else's last group.
    """
    handle = _mount_handle()
    if handle is None:
        yield []
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield [handle]
    finally:
        os.close(handle)


def _drop_parent(parent: Path, timeout_s: float = 1.0) -> None:
    """Remove the shared folder unless groups are in it or somebody holds it; a keeper that just died soon lets go."""
    deadline = time.monotonic() + timeout_s
    with suppress(OSError), os.scandir(parent) as entries:
        if any(entry.is_dir() for entry in entries):
            return
    handle = _mount_handle()
    try:
        while handle is not None and not _try_lock(handle):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        with suppress(OSError):
            parent.rmdir()  # fails when another sandbox came
    finally:
        if handle is not None:
            os.close(handle)


def _mount_handle() -> int | None:
    """The top of the first hierarchy, on which all processes that see it can meet; None where none can be opened."""
    for mount in _mounts()[:1]:
        with suppress(OSError):
            return os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return None


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
