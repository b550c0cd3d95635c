"""Container by runc: started by root, each sandbox has 65,536 host ids of its own; for an ordinary user, his one.

Isolates: user, mount, process, network, host name, IPC and control-group namespaces; no new privileges; a system call
filter on everything in it and a second one on every command; parts of /proc hidden. `user="root"` is root of the
private range alone, with what installing packages takes (no mounts, no devices, no tracing). Memory, processes and
processor time are held by control groups where this process may make them.
Does not isolate: the kernel is the host's, so a hole in it is a hole here. Use a microvm or vm where that matters.

keeper -> holder (private mounts, layers stacked) -> runc -> agent as process 1; see agent/keep.c.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from rorqual.sandbox import cgroups
from rorqual.sandbox.agent.build import agent_binary
from rorqual.sandbox.drivers import oci
from rorqual.sandbox.drivers.base import Running
from rorqual.sandbox.drivers.bwrap import Bwrap, choose_cpus, inner_uid, launch
from rorqual.sandbox.errors import Unsupported
from rorqual.sandbox.host_root import host_root
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.snapshots import names_of, on_host_root
from rorqual.sandbox.spec import SandboxSpec

FIRST_ID, LAST_ID = 1 << 28, (1 << 31) - oci.IDS
"""Where private ranges lie: far above what distributions give to users and their containers."""
_OWN_PIDS = 64  # keeper's holder and runc's threads, which stand in the sandbox's group
_WRAP = 'exec 3<&5 4<&6; exec "$@"'  # runc passes on descriptors from 3; the keeper leaves them at 5 and 6


class Runc(Bwrap):
    """Containers through runc; what is the same as with bubblewrap is inherited."""

    name = "runc"

    def missing(self) -> str | None:
        """What plainly lacks here."""
        if shutil.which("runc") is None:
            return "runc is not installed; an administrator can `apt install runc`"
        lacking = super().missing()
        return None if lacking is not None and lacking.startswith("bubblewrap") else lacking

    def _start(self, spec: SandboxSpec, home: Path) -> Running:
        store = Store()
        names = store.resolve(names_of(spec))
        lowers, shown = store.lowerdirs(names), list[str]()
        if on_host_root(spec):
            root, shown = host_root()
            lowers.append(root)
        first_id = fresh_range() if os.geteuid() == 0 else None
        group = cgroups.create(home.name, replace(spec.limits, pids=spec.limits.pids + _OWN_PIDS))
        try:
            if first_id is not None and group is None:
                raise Unsupported(
                    f"runc started by root needs control groups, and {cgroups.why_not()}. Use the bwrap driver.",
                    "cgroups",
                )
            self._write_bundle(spec, home, first_id, shown, group)
            enforced, extra, command = self._command(spec, home, lowers, first_id, group)
            keeper, holder = launch(command, home, group)
            store.release()
        except BaseException:
            if group is not None:
                group.kill()
                group.remove()
            raise
        extra |= {"layers": names, "first_id": first_id}
        paths = group.paths if group is not None else []
        channel = {"unix": "channel"}
        return Running([keeper, holder], channel, secrets.token_hex(32), cgroups=paths, enforced=enforced, extra=extra)

    def _write_bundle(
        self, spec: SandboxSpec, home: Path, first_id: int | None, shown: list[str], group: cgroups.Group | None
    ) -> None:
        inside = f"/{cgroups.PARENT}/{home.name}/runc" if group is not None else None
        made = oci.config(spec, home.name, first_id=first_id, shown=shown, cgroup=inside, pids=spec.limits.pids)
        (home / "bundle").mkdir(exist_ok=True)
        (home / "bundle" / "config.json").write_text(json.dumps(made, indent=1))

    def _command(
        self, spec: SandboxSpec, home: Path, lowers: list[Path], first_id: int | None, group: cgroups.Group | None
    ) -> tuple[dict[str, str], dict[str, object], list[str]]:
        """What holds which limit, what the agent is told, and the keeper's command."""
        limits, extra = spec.limits, dict[str, object]()
        enforced = {"disk": "tmpfs size", "inodes": "tmpfs inodes", "open_files": "rlimit", "file_mb": "rlimit"}
        command = [str(agent_binary()), "keep", "--home", str(home)]
        command += ["--disk-mb", str(limits.disk_mb), "--inodes", str(limits.inodes)]
        if first_id is not None:
            command += ["--uid", str(first_id), "--inner-uid", "0", "--range", str(oci.IDS)]
        for lower in lowers:
            command += ["--lower", str(lower)]
        if group is not None:
            enforced |= group.describe()
        else:
            cpus = choose_cpus(limits.cpu)
            command += ["--memory-mb", str(limits.memory_mb), "--cpus", ",".join(map(str, cpus))]
            enforced |= {
                "memory": "watched by the keeper every 50 ms, and rlimit",
                "pids": "rlimit in its user namespace",
                "cpu": f"{len(cpus)} of {os.cpu_count()} processors",
            }
            extra |= {"data_limit_mb": 2 * limits.memory_mb, "nproc": limits.pids, "cpu_locked": True}
        shell, runc = shutil.which("sh") or "/bin/sh", shutil.which("runc") or "runc"
        command += ["--", shell, "-c", _WRAP, "sh", runc, "--root", str(home / "runc")]
        command += ["--log", str(home / "runc.log"), *(["--rootless", "true"] if first_id is None else [])]
        command += ["run", "--no-new-keyring", "--preserve-fds", "2", "--bundle", str(home / "bundle"), home.name]
        return enforced, extra, command

    def _stop(self, running: Running) -> list[str]:
        left = super()._stop(running)
        if running.cgroups:  # runc makes its group in every hierarchy, also where ours is not
            left += [f"control group {path}" for path in cgroups.remove_everywhere(Path(running.cgroups[0]).name)]
        return left

    async def snapshot_disk(self, running: Running, home: Path) -> str:
        """Pack the upper folder, read through the holder's mount namespace, with the owners the sandbox sees."""
        upper = Path(f"/proc/{running.processes[1].pid}/root/mnt/up/upper")
        first = running.extra.get("first_id")
        if first is not None:
            owners = [(int(first), 0, oci.IDS)]
        else:
            from rorqual.sandbox.home import Home

            owners = [(os.geteuid(), inner_uid(Home(home).read().spec), 1)]
        return await asyncio.to_thread(lambda: Store().pack(upper, owners=owners))


def fresh_range() -> int:
    """The first of 65,536 host ids that no other sandbox on this machine has had since boot: a counter in /run."""
    folder = Path("/run/rorqual")
    folder.mkdir(mode=0o755, exist_ok=True)
    with open(folder / "last-range", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        last = int(file.read() or FIRST_ID)
        first = last + oci.IDS if FIRST_ID <= last < LAST_ID - oci.IDS else FIRST_ID + oci.IDS
        file.truncate(0)
        file.write(str(first))
    return first
