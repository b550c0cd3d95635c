"""Container by bubblewrap: namespaces without any privilege, for root and for ordinary users alike.

Isolates: user, mount, process, network, host name, IPC and control-group namespaces; no capability; no new privileges;
a system call filter and limits on every command (agent/confine.c). When root starts it, the sandbox runs under a
host uid that no other sandbox has; with root's own uid bwrap would keep its powers, and the keeper refuses that form.
Does not isolate: the kernel is the host's, so a hole in it is a hole here. Use a microvm or vm where that matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups, processes
from rorqual.sandbox.agent.build import agent_binary
from rorqual.sandbox.drivers.base import Driver, Process, Running
from rorqual.sandbox.drivers.streams import connect_unix
from rorqual.sandbox.errors import Unsupported
from rorqual.sandbox.home import Home
from rorqual.sandbox.host_ids import fresh_uid
from rorqual.sandbox.host_root import host_root
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.snapshots import names_of, on_host_root
from rorqual.sandbox.spec import Capabilities, Kind, SandboxSpec
from rorqual.sandbox.threads import in_thread

MAX_LOWERS = 64  # as agent/keep.c has it
OWN_PROCESSES = 32  # so that a sandbox whose own are used up still starts a command that ends them
_MASKED_FILES = (
    *("kcore", "kmsg", "keys", "key-users", "sysrq-trigger", "timer_list", "sched_debug", "kallsyms", "config.gz"),
    *("kpagecount", "kpageflags", "kpagecgroup", "latency_stats", "timer_stats", "interrupts", "iomem", "ioports"),
    *("modules", "vmallocinfo", "slabinfo", "swaps", "diskstats", "partitions", "mtrr", "dma", "crypto"),
)
_MASKED_FOLDERS = ("acpi", "scsi", "asound", "driver", "fs", "bus", "irq")


class Bwrap(Driver):
    """Containers through bubblewrap."""

    kind: ClassVar[Kind] = "container"
    name: ClassVar[str] = "bwrap"

    def missing(self) -> str | None:
        """What plainly lacks here."""
        if shutil.which("bwrap") is None:
            return "bubblewrap is not installed; an administrator can `apt install bubblewrap` (or dnf, pacman)"
        for path, wanted in (
            ("/proc/sys/kernel/unprivileged_userns_clone", "1"),
            ("/proc/sys/user/max_user_namespaces", ""),
        ):
            try:
                value = Path(path).read_text().strip()
            except OSError:
                continue
            if value == "0":
                name = path.removeprefix("/proc/sys/").replace("/", ".")
                return f"user namespaces are off; an administrator can allow them: sysctl -w {name}={wanted or 10000}"
        restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
        if os.geteuid() != 0 and restricted.exists() and restricted.read_text().strip() == "1":
            return (
                "AppArmor keeps ordinary users from user namespaces with powers; an administrator can allow them: "
                "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
            )
        return None

    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""
        return Capabilities(isolation="namespace", pause_memory=True, snapshot_disk=True, pty=True, disk_quota=True)

    async def start(self, spec: SandboxSpec, home: Path) -> Running:
        """Start keeper, holder, bwrap and agent; returns when the keeper runs."""
        if spec.network != "none":
            raise Unsupported(
                f"network={spec.network!r}: the bwrap driver gives no network at all. Use network='none'.",
                "network_allowlist",
            )
        return await in_thread(self._start, spec, home, undo=self._stop)

    async def check(self, spec: SandboxSpec, home: Path) -> None:
        """Every layer is in the store, as it was stored, and there are not too many."""
        await asyncio.to_thread(self._check, spec)

    def _check(self, spec: SandboxSpec) -> None:
        store = Store()
        for digest in named_layers(store, spec):
            store.object_path(digest)

    def _start(self, spec: SandboxSpec, home: Path) -> Running:
        limits = spec.limits
        enforced: dict[str, str] = {}
        store = Store()
        names = named_layers(store, spec)
        lowers, shown = lower_folders(store, spec, names)
        command = [str(agent_binary()), "keep", "--home", str(home)]
        if os.geteuid() == 0:
            outer = fresh_uid()
            command += ["--uid", str(outer), "--inner-uid", str(inner_uid(spec))]
        else:
            outer = os.geteuid()
        for lower in lowers:
            command += ["--lower", str(lower)]
        command += ["--disk-mb", str(limits.disk_mb), "--inodes", str(limits.inodes)]
        enforced |= {"disk": "tmpfs size", "inodes": "tmpfs inodes", "open_files": "rlimit", "file_mb": "rlimit"}
        group = cgroups.create(home.name, replace(limits, pids=limits.pids + OWN_PROCESSES))
        extra: dict[str, object] = {"uid": outer, "layers": names}
        if group is None:
            cpus = choose_cpus(limits.cpu)
            command += ["--memory-mb", str(limits.memory_mb), "--cpus", ",".join(map(str, cpus))]
            enforced |= {
                "memory": "watched by the keeper every 50 ms, and rlimit",
                "pids": "rlimit in its user namespace",
                "cpu": f"{len(cpus)} of {os.cpu_count()} processors",
            }
            extra |= {"data_limit_mb": 2 * limits.memory_mb, "nproc": limits.pids, "cpu_locked": True}
        else:
            enforced |= group.describe()
            enforced["pids"] = (
                f"rlimit in its user namespace, and {enforced['pids']} with {OWN_PROCESSES} more for ours"
            )
        command += ["--", shutil.which("bwrap") or "bwrap", *self._bwrap(spec, shown, home.name)]
        try:
            keeper, holder = launch(command, home, group, store.local.locks())
            store.release()
        except BaseException:
            store.release()
            store.local.drop(names)
            if group is not None:
                group.kill()
                group.remove()
            raise
        return Running(
            [keeper, holder],
            {"unix": "channel"},
            secrets.token_hex(32),
            cgroups=group.paths if group is not None else [],
            enforced=enforced,
            extra=extra,
        )

    def _bwrap(self, spec: SandboxSpec, shown: list[str], name: str) -> list[str]:
        uid = str(inner_uid(spec))
        options = [
            *(
                "--unshare-all",
                "--unshare-user",
                "--disable-userns",
                "--new-session",
                "--die-with-parent",
                "--as-pid-1",
            ),
            *("--cap-drop", "ALL", "--clearenv", "--uid", uid, "--gid", uid, "--hostname", name),
            *("--bind", "@merged", "/", *shown, "--proc", "/proc", "--dev", "/dev"),
            *("--size", str(64 << 20), "--tmpfs", "/dev/shm", "--chmod", "1777", "/dev/shm", "--remount-ro", "/dev"),
        ]
        for masked in _MASKED_FILES:
            if Path("/proc", masked).exists():
                options += ["--ro-bind", "/dev/null", f"/proc/{masked}"]
        for masked in _MASKED_FOLDERS:
            if Path("/proc", masked).is_dir():
                options += ["--size", "4096", "--tmpfs", f"/proc/{masked}", "--remount-ro", f"/proc/{masked}"]
        return [*options, "--chdir", "/", "--", "@agent", "serve", "--listen", "5", "--life", "7"]

    async def connect(self, running: Running, home: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to the agent's socket, which lies in the sandbox's folder on the host."""
        return await connect_unix(home, running.channel["unix"])

    async def stop(self, running: Running, home: Path) -> list[str]:
        """Ends the keeper's tree; the mounts and namespaces go with it."""
        return await asyncio.to_thread(self._stop, running)

    def _stop(self, running: Running) -> list[str]:
        tree = list(running.processes)
        for process in running.processes:
            if processes.alive(process):
                tree += [below for below in processes.below(process.pid) if below not in tree]
        left = [f"process {process.pid}" for process in processes.end_all(tree)]
        if running.cgroups:
            group = cgroups.adopt(running.cgroups)
            left += [f"process {pid}" for pid in group.kill()]
            left += [f"control group {path}" for path in group.remove()]
        Store().local.drop(running.extra.get("layers", ()))
        return left

    async def pause(self, running: Running, home: Path, keep_memory: bool) -> None:
        """Nothing more to do: the agent has stopped every process, and a stopped one can still be killed."""

    async def resume(self, running: Running, home: Path) -> Running:
        """The same processes run on."""
        return running

    async def snapshot_disk(self, running: Running, home: Path) -> str:
        """Pack the upper folder, read through the holder's mount namespace."""
        spec = Home(home).read().spec
        upper = Path(f"/proc/{running.processes[1].pid}/root/mnt/up/upper")
        owners = ((int(running.extra["uid"]), inner_uid(spec), 1),)
        return await asyncio.to_thread(lambda: Store().pack(upper, owners=owners))

    async def oom_kills(self, running: Running, home: Path) -> int:
        """How often the kernel, or the keeper, ended a process for memory."""
        if running.cgroups:
            return await asyncio.to_thread(cgroups.adopt(running.cgroups).oom_kills)
        try:
            return int((home / "oom").read_text())
        except (OSError, ValueError):
            return 0

    async def memory_bytes(self, running: Running) -> int:
        """Its group's memory, or the proportional share of its processes."""
        if running.cgroups:
            return await asyncio.to_thread(cgroups.adopt(running.cgroups).memory_bytes)
        return await asyncio.to_thread(lambda: sum(pss(process.pid) for process in tree_of(running)))


def named_layers(store: Store, spec: SandboxSpec) -> list[str]:
    """Digests of the layers a sandbox stands on, from the bottom up. Raises: SandboxError; Unsupported for too many."""
    digests = store.resolve(names_of(spec))
    if len(digests) + on_host_root(spec) > MAX_LOWERS:
        raise Unsupported(
            f"{len(digests)} layers are more than a container is stacked from ({MAX_LOWERS}). Make the image of fewer: "
            "export it and import it as one.",
            "layers",
        )
    return digests


def lower_folders(store: Store, spec: SandboxSpec, digests: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Read-only folders of these layers, the topmost first, and what of this machine is bound into their root."""
    lowers = store.lowerdirs(digests)
    if not on_host_root(spec):
        return lowers, []
    root, shown = host_root()
    return [*lowers, root], shown


def tree_of(running: Running) -> list[Process]:
    """Every host process of a sandbox that is alive now."""
    tree: list[Process] = []
    for process in running.processes:
        if processes.alive(process):
            tree += [found for found in (process, *processes.below(process.pid)) if found not in tree]
    return tree


def pss(pid: int) -> int:
    """Bytes of memory that this process takes, shared pages divided among their users."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:  # the agent hides its map; what it holds is then its resident memory
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def inner_uid(spec: SandboxSpec) -> int:
    """The one user that exists inside."""
    return 0 if spec.user == "root" else 1000


def choose_cpus(cpu: float) -> list[int]:
    """As many processors as the limit needs, drawn by chance from those this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    count = min(max(1, math.ceil(cpu)), len(allowed))
    return sorted(secrets.SystemRandom().sample(allowed, count))


def launch(
    command: list[str], home: Path, group: cgroups.Group | None, locks: Sequence[int] = ()
) -> tuple[Process, Process]:
    """Start the keeper; the holder enters the group before it goes on. Raises: SandboxError with what they said.

    locks: handles that the keeper has for as long as it lives, those of the layers the sandbox stands on.
    """
    log = home / "keeper.log"
    with open(log, "ab") as errors:
        child = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={},
            start_new_session=True,
            pass_fds=locks,
        )
    assert child.stdin is not None and child.stdout is not None
    with child:
        words = child.stdout.readline().split()
        if len(words) == 4:
            keeper, holder = processes.identify(int(words[1])), processes.identify(int(words[3]))
            if keeper is not None and holder is not None:
                with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # it was killed in this moment
                    if group is not None:
                        group.attach(holder.pid)
                    child.stdin.write(b"g")
                    return keeper, holder
    said = log.read_text(errors="replace").strip()[-1000:]
    raise SandboxError(
        f"the sandbox's keeper did not start: {said or 'it said nothing'}. See `rorqual sandbox doctor`."
    )
