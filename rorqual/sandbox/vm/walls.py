"""The walls around a machine monitor: a file system of /usr and its own files, no network, no capability, its own uid.

bubblewrap builds them. Started by root it needs no user namespace, and setpriv then turns the monitor into a host user
that no other machine has; an ordinary user's monitor stays that user, in a user namespace.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from rorqual.errors import SandboxError

_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def can_wall() -> bool:
    """Whether bubblewrap is here and may build walls (user namespaces may be forbidden)."""
    bwrap = shutil.which("bwrap")
    return bwrap is not None and _works(bwrap)


def refuse_root() -> None:
    """Raises: SandboxError when root would run a monitor without walls."""
    if os.geteuid() == 0:
        raise SandboxError("started by root, a machine monitor needs bubblewrap around it: `apt install bubblewrap`.")


def walled(
    program: Sequence[str], binds: Sequence[str], kvm_in: Path | None, uid: int | None, name: str
) -> tuple[list[str], str]:
    """The command that runs `program` inside, and what stands around it in words.

    binds: bubblewrap's options for its files; kvm_in: a folder for a device node when it may use KVM, else None.
    Raises: SandboxError when setpriv is missing and needed.
    """
    bwrap = shutil.which("bwrap") or "bwrap"
    options = [
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--new-session"),
        *("--die-with-parent", "--clearenv", "--setenv", "PATH", "/usr/bin", "--ro-bind", "/usr", "/usr"),
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev", "/dev", "--tmpfs", "/tmp"),
    ]
    for merged in _MERGED:
        path = Path("/", merged)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    if kvm_in is not None:
        options += ["--dev-bind", str(_kvm_node(kvm_in, uid)), "/dev/kvm"]
    options += [*binds, "--chdir", "/"]
    if uid is None:
        return [
            bwrap,
            "--unshare-user",
            "--cap-drop",
            "ALL",
            *options,
            "--",
            *program,
        ], f"bubblewrap and {name}'s filter"
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError(f"started by root, {name} needs setpriv to become another user: `apt install util-linux`.")
    drop = [setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]
    words = [bwrap, *options, "--", *drop, "--bounding-set=-all", "--", *program]
    return words, f"bubblewrap, uid {uid} without capabilities, {name}'s filter"


def _kvm_node(folder: Path, uid: int | None) -> Path:
    """/dev/kvm, or when the monitor gets a uid of its own, a node of the same device that only this uid may open."""
    if uid is None:
        return Path("/dev/kvm")
    node = folder / "kvm"
    node.unlink(missing_ok=True)
    os.mknod(node, stat.S_IFCHR | 0o600, os.stat("/dev/kvm").st_rdev)
    os.chown(node, uid, uid)
    return node


@lru_cache
def _works(bwrap: str) -> bool:
    test = [bwrap, "--unshare-pid", "--ro-bind", "/", "/", "--", "/bin/true"]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0
