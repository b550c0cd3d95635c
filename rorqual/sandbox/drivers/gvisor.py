"""Small sandboxes by gVisor: a kernel written in Go, as a process, answers every system call of the sandbox.

Isolates: programs never call the host's kernel themselves; gVisor's own kernel (the sentry) does so for them with few
and filtered calls. It runs as `runsc --rootless` in a user namespace, under a host uid of its own when root starts it,
with no network but its own loopback. This is "app-kernel" isolation, not a machine: info() says so.
Does not isolate: a hole in the sentry, and behind it in the few host calls that it makes.

Needs a runsc of 2024 or later: older ones (Debian 12's) fail in `ls` and `stat` of current coreutils, which the probe
notices because the sandbox's first act is an `ls`. $RORQUAL_RUNSC names another than the one on PATH.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
from rorqual.sandbox import cgroups
from rorqual.sandbox.agent.build import agent_binary
from rorqual.sandbox.drivers.base import Running
from rorqual.sandbox.drivers.bwrap import Bwrap, choose_cpus, launch, lower_folders, named_layers
from rorqual.sandbox.drivers.streams import connect_fifos
from rorqual.sandbox.errors import Unsupported
from rorqual.sandbox.host_ids import fresh_uid
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.spec import Capabilities, Limits, SandboxSpec

SENTRY_MB = 192
"""Host memory beside what programs use: the sentry, its file server, its tables."""
HOST_THREADS = 1024
"""gVisor needs threads of the host for its own; with a limit of 64 it aborted at random (exit code 2)."""
CHECK_S = 20.0
_POWERS = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID")


class Gvisor(Bwrap):
    """microvm sandboxes through runsc; keeper, layers and limits are those of the bwrap driver."""

    kind = "microvm"
    name = "gvisor"
    probe_timeout_s = 30.0

    def missing(self) -> str | None:
        """What plainly lacks here."""
        runsc = binary()
        if runsc is None:
            return "runsc is not installed; `apt install runsc` (Debian 13 or later) or name one with RORQUAL_RUNSC"
        return super().missing() if shutil.which("bwrap") else _namespaces_off()

    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""
        return Capabilities(isolation="app-kernel", pause_memory=True, pty=True)

    def _start(self, spec: SandboxSpec, home: Path) -> Running:
        limits = spec.limits
        runsc = binary()
        if runsc is None:
            raise SandboxError(f"{self.missing()}.")
        check_works(runsc)
        store = Store()
        names = named_layers(store, spec)
        lowers, shown = lower_folders(store, spec, names)
        bundle = home / "bundle"
        bundle.mkdir(mode=0o755)
        bundle.chmod(0o755)
        shutil.copyfile(agent_binary(), bundle / "agent")
        (bundle / "agent").chmod(0o755)
        (bundle / "config.json").write_text(json.dumps(self._config(spec, shown, home.name)))
        (bundle / "config.json").chmod(0o644)
        for fifo in ("in", "out"):
            os.mkfifo(home / fifo, 0o600)
        command = [str(agent_binary()), "keep", "--home", str(home), "--channel", "fifos", "--show", str(bundle)]
        uid = fresh_uid() if os.geteuid() == 0 else None
        command += ["--uid", str(uid)] if uid is not None else []
        for lower in lowers:
            command += ["--lower", str(lower)]
        command += ["--disk-mb", str(limits.disk_mb), "--inodes", str(limits.inodes)]
        extra: dict[str, Any] = {"nproc": limits.pids, "layers": names, "runsc": runsc}
        enforced = {
            "disk": "size of the tmpfs below gVisor's files; a full one ends the sandbox",
            "pids": "rlimit in gVisor",
            "open_files": "rlimit",
            "file_mb": "rlimit",
        }
        host = Limits(limits.cpu, limits.memory_mb + SENTRY_MB, limits.disk_mb, max(HOST_THREADS, 4 * limits.pids))
        group = cgroups.create(home.name, host)
        if group is None:
            cpus = choose_cpus(limits.cpu)
            command += ["--memory-mb", str(host.memory_mb), "--cpus", ",".join(map(str, cpus))]
            enforced["memory"] = "watched by the keeper every 50 ms: too much ends the sandbox"
            enforced["cpu"] = f"{len(cpus)} of {os.cpu_count()} processors"
            extra["data_limit_mb"] = 2 * limits.memory_mb
        else:
            told = group.describe()
            enforced |= {"memory": f"{told.get('memory')}, with {SENTRY_MB} MiB for gVisor", "cpu": told.get("cpu", "")}
            extra["data_limit_mb"] = limits.memory_mb
        command += ["--", runsc, *self._options(), "run", "-bundle", "/mnt/show", home.name]
        try:
            keeper, holder = launch(command, home, group, store.local.locks())
            store.release()
        except BaseException:
            if group is not None:
                group.kill()
                group.remove()
            raise
        paths = group.paths if group is not None else []
        channel = {"fifo": ["in", "out"]}
        return Running([keeper, holder], channel, secrets.token_hex(32), cgroups=paths, enforced=enforced, extra=extra)

    @staticmethod
    def _options() -> list[str]:
        return [
            *("--root=/mnt/run", "--rootless", "--network=none", "--ignore-cgroups", "--platform=systrap"),
            *("--overlay2=root:dir=/mnt/up/own", "--host-uds=none", "--host-fifo=none"),
        ]

    def _config(self, spec: SandboxSpec, shown: list[str], name: str) -> dict[str, Any]:
        """The OCI runtime's configuration."""
        powers = [f"CAP_{power}" for power in _POWERS]
        mounts: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "mode=755"]},
            # gVisor would put a tmpfs of its own there, without a bound
            {
                "destination": "/tmp",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "nodev", "mode=1777", f"size={spec.limits.disk_mb}m"],
            },
            {"destination": "/.agent", "type": "bind", "source": "/mnt/show/agent", "options": ["ro"]},
        ]
        for source, target in zip(shown[1::3], shown[2::3], strict=True):  # bwrap's --ro-bind SOURCE TARGET
            mounts.append({"destination": target, "type": "bind", "source": source, "options": ["ro", "rbind"]})
        limit = spec.limits.open_files + 64
        return {
            "ociVersion": "1.0.2",
            "hostname": name,
            "root": {"path": "/mnt/merged", "readonly": False},
            "process": {
                "terminal": False,
                "user": {"uid": 0, "gid": 0},
                "args": ["/.agent", "serve", "--stdio"],
                "env": ["PATH=/usr/bin:/bin"],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), powers),
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": max(4096, limit), "soft": max(4096, limit)}],
            },
            "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
        }

    async def connect(self, running: Running, home: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The pair of FIFOs that are the agent's input and output."""
        inward, outward = running.channel["fifo"]
        return await connect_fifos(home, inward, outward)

    async def snapshot_disk(self, running: Running, home: Path) -> str:
        """gVisor keeps what was written in its own file, which only it can read. Raises: Unsupported."""
        raise self._cannot("snapshot_disk", "take a disk snapshot")


def binary() -> str | None:
    """The runsc to use: $RORQUAL_RUNSC, else from PATH."""
    named = os.environ.get("RORQUAL_RUNSC")
    return shutil.which(named) if named else shutil.which("runsc")


_checked: dict[str, str | None] = {}


def check_works(runsc: str) -> None:
    """Run `ls -l /` in the barest sandbox of this runsc, once a process. Raises: Unsupported when it fails."""
    if runsc not in _checked:
        _checked[runsc] = _why_broken(runsc)
    why = _checked[runsc]
    if why is not None:
        raise Unsupported(f"{runsc} does not work here: {why}", "run")


def _why_broken(runsc: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="rorqual-runsc-") as state:
        options = [f"--root={state}", *(["--rootless"] if os.geteuid() else []), "--network=none", "--ignore-cgroups"]
        command = [runsc, *options, "--platform=systrap", "do", "--quiet", "ls", "-l", "/etc"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_S, check=False)
        except subprocess.TimeoutExpired:
            return f"`ls` in it did not end within {CHECK_S:g} s"
        except OSError as error:
            return str(error)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-300:]
            return f"`ls` in it ended with {done.returncode}: {said}. Debian 12's runsc is too old; take Debian 13's"
    return None


def _namespaces_off() -> str | None:
    try:
        off = Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0"
    except OSError:
        return None
    return (
        "user namespaces are off; an administrator can allow them: sysctl -w user.max_user_namespaces=10000"
        if off
        else None
    )
