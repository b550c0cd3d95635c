"""Container by runc, for root: each sandbox has 65,536 host ids of its own, so it has users, and a root of its own.

Isolates: user, mount, process, network, host name, IPC and control-group namespaces; no new privileges; a system call
filter on everything in it and a second one on every command; parts of /proc hidden. `user="root"` is root of the
private range alone, with what installing packages takes (no mounts, no devices, no tracing). Memory, processes,
devices and processor time are held by control groups.
Does not isolate: the kernel is the host's, so a hole in it is a hole here. Use a microvm or vm where that matters.

keeper -> holder (private mounts, layers stacked) -> runc -> agent as process 1; see agent/keep.c.
"""

from __future__ import annotations

import asyncio
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
from rorqual.sandbox.drivers.bwrap import Bwrap, launch, lower_folders, named_layers
from rorqual.sandbox.errors import Unsupported
from rorqual.sandbox.host_ids import RANGE, fresh_range
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.spec import SandboxSpec

_OWN_PIDS = 64  # keeper's holder and runc's threads, which stand in the sandbox's group
_WRAP = 'exec 3<&5 4<&6; exec "$@"'  # runc passes on descriptors from 3; the keeper leaves them at 5 and 6


class Runc(Bwrap):
    """Containers through runc; what is the same as with bubblewrap is inherited."""

    name = "runc"

    def missing(self) -> str | None:
        """What plainly lacks here."""
        if shutil.which("runc") is None:
            return "runc is not installed; an administrator can `apt install runc`"
        if os.geteuid() != 0:
            return (
                "only root can give each sandbox a range of user ids and a control group, as runc is used here; "
                "bubblewrap isolates as well for an ordinary user, with one id inside"
            )
        reason = cgroups.why_not()
        return f"runc is held by control groups here, and {reason}" if reason else None

    def _start(self, spec: SandboxSpec, home: Path) -> Running:
        store = Store()
        names = named_layers(store, spec)
        lowers, shown = lower_folders(store, spec, names)
        first_id = fresh_range()
        group = cgroups.create(home.name, replace(spec.limits, pids=spec.limits.pids + _OWN_PIDS))
        if group is None:
            raise Unsupported(f"{cgroups.why_not()}. Use the bwrap driver.", "cgroups")
        try:
            self._write_bundle(spec, home, first_id, shown)
            command = self._command(spec, home, lowers, first_id)
            with cgroups.parent_held() as held:
                keeper, holder = launch(command, home, group, [*store.local.locks(), *held])
            store.release()
        except BaseException:
            store.release()
            store.local.drop(names)
            group.kill()
            group.remove()
            cgroups.remove_everywhere(home.name)
            raise
        enforced = {"disk": "tmpfs size", "inodes": "tmpfs inodes", "open_files": "rlimit", "file_mb": "rlimit"}
        return Running(
            [keeper, holder],
            {"unix": "channel"},
            secrets.token_hex(32),
            cgroups=group.paths,
            enforced=enforced | group.describe() | {"devices": "cgroup devices by runc"},
            extra={"layers": names, "first_id": first_id},
        )

    def _write_bundle(self, spec: SandboxSpec, home: Path, first_id: int, shown: list[str]) -> None:
        shutil.rmtree(home / "runc", ignore_errors=True)  # what runc wrote down of the container before a rollback
        inside = f"/{cgroups.PARENT}/{home.name}/runc"
        made = oci.config(spec, home.name, first_id=first_id, shown=shown, cgroup=inside)
        (home / "bundle").mkdir(exist_ok=True)
        (home / "bundle" / "config.json").write_text(json.dumps(made, indent=1))

    def _command(self, spec: SandboxSpec, home: Path, lowers: list[Path], first_id: int) -> list[str]:
        command = [str(agent_binary()), "keep", "--home", str(home)]
        command += ["--uid", str(first_id), "--inner-uid", "0", "--range", str(RANGE)]
        command += ["--disk-mb", str(spec.limits.disk_mb), "--inodes", str(spec.limits.inodes)]
        for lower in lowers:
            command += ["--lower", str(lower)]
        shell, runc = shutil.which("sh") or "/bin/sh", shutil.which("runc") or "runc"
        command += ["--", shell, "-c", _WRAP, "sh", runc, "--root", str(home / "runc"), "--log", str(home / "runc.log")]
        return [*command, "run", "--no-new-keyring", "--preserve-fds", "2", "--bundle", str(home / "bundle"), home.name]

    def _stop(self, running: Running) -> list[str]:
        left = super()._stop(running)
        # runc makes its group in every hierarchy, also where ours is not
        return left + [f"control group {path}" for path in cgroups.remove_everywhere(Path(running.cgroups[0]).name)]

    async def snapshot_disk(self, running: Running, home: Path) -> str:
        """Pack the upper folder, read through the holder's mount namespace, with the owners the sandbox sees."""
        upper = Path(f"/proc/{running.processes[1].pid}/root/mnt/up/upper")
        owners = [(int(running.extra["first_id"]), 0, RANGE)]
        return await asyncio.to_thread(lambda: Store().pack(upper, owners=owners))
