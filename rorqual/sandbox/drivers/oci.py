"""The configuration that runc is given: namespaces, ids, mounts, capabilities, system calls. Plain data.

The system calls refused are those of agent/confine.c, here for everything in the container, the agent included.
Source: the OCI runtime specification.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from rorqual.sandbox.agent.build import FOLDER
from rorqual.sandbox.host_ids import RANGE
from rorqual.sandbox.spec import SandboxSpec

ROOT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_KILL",
)
"""What installing packages and changing to another user take; never CAP_SYS_ADMIN."""
MASKED = (
    *("acpi", "asound", "bus", "config.gz", "crypto", "diskstats", "dma", "driver", "fs", "interrupts", "iomem"),
    *("ioports", "irq", "kallsyms", "kcore", "key-users", "keys", "kmsg", "kpagecgroup", "kpagecount", "kpageflags"),
    *("latency_stats", "modules", "mtrr", "partitions", "sched_debug", "scsi", "slabinfo", "swaps", "sysrq-trigger"),
    *("timer_list", "timer_stats", "vmallocinfo"),
)
READ_ONLY = ("sys",)
_NAMESPACE_BITS = [1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)]  # mnt, cgroup, uts, ipc, user, pid, net
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_EPERM, _ENOSYS = 1, 38


def config(spec: SandboxSpec, hostname: str, *, first_id: int, shown: Sequence[str], cgroup: str) -> dict[str, Any]:
    """One container. first_id: where its 65,536 host ids begin; cgroup: the group that runc makes.

    shown: folders of the host to show read-only as (option, from, to) in a row.
    """
    mapping = [{"containerID": 0, "hostID": first_id, "size": RANGE}]
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": "/mnt/merged", "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/proc/self/fd/4", "serve", "--listen", "3"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), list(ROOT_CAPABILITIES)),
        },
        "mounts": _mounts(shown),
        "linux": {
            "namespaces": [{"type": one} for one in ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")],
            "uidMappings": mapping,
            "gidMappings": mapping,
            "cgroupsPath": cgroup,
            "resources": {"pids": {"limit": spec.limits.pids}},
            "seccomp": seccomp(),
            "maskedPaths": [f"/proc/{name}" for name in MASKED],
            "readonlyPaths": [f"/proc/{name}" for name in READ_ONLY],
        },
    }


def _mounts(shown: Sequence[str]) -> list[dict[str, Any]]:
    plain = ["nosuid", "noexec", "nodev"]
    terminals = ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    return [
        *(
            {"destination": to, "type": "bind", "source": source, "options": ["rbind", "ro", "nosuid", "nodev"]}
            for _, source, to in zip(shown[::3], shown[1::3], shown[2::3], strict=True)
        ),
        {"destination": "/proc", "type": "proc", "source": "proc", "options": plain},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=64k"],
        },
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", *terminals]},
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64m"],
        },
    ]


@cache
def refused_calls() -> tuple[str, ...]:
    """Names of the system calls that agent/confine.c refuses, read from it so that they stand in one place.

    Those that the library behind runc is too old to know it leaves out; the agent refuses them all the same.
    """
    names = re.findall(r"SYS_\w+|NR_\w+|\b442\b", _block("REFUSED"))
    return tuple(sorted({re.sub(r"^(SYS|NR)_", "", name).lower().replace("442", "mount_setattr") for name in names}))


@cache
def refused_ioctls() -> tuple[int, ...]:
    """Numbers of the device controls that agent/confine.c refuses."""
    return tuple(int(number, 16) for number in re.findall(r"0x[0-9a-f]+", _block("REFUSED_IOCTLS")))


def _block(name: str) -> str:
    """What stands between the braces of a table in confine.c, without comments and conditions."""
    text = (FOLDER / "confine.c").read_text().partition(f" {name}[] = {{")[2].partition("};")[0]
    return re.sub(r"^#.*$", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL), flags=re.MULTILINE)


def seccomp() -> dict[str, Any]:
    """The filter in OCI's form; calls of another architecture end the process."""
    masked = [{"index": 0, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ"} for bit in _NAMESPACE_BITS]
    ioctls = [{"index": 1, "value": number, "op": "SCMP_CMP_EQ"} for number in refused_ioctls()]
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [_ARCHITECTURES[platform.machine()]],
        "syscalls": [
            {"names": list(refused_calls()), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
            *({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM, "args": [one]} for one in masked),
            *({"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM, "args": [one]} for one in ioctls),
        ],
    }
