"""The root that a container has when no image is named: this machine's programs and nothing else of it.

/usr is shown read-only; beside it stand a minimal /etc without secrets, and empty folders. Nothing of /home, /root,
/var or the rest of /etc is visible. It needs no preparation, so an ordinary user has a sandbox at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from rorqual.folders import cache_folder

_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_FOLDERS = (
    *("dev", "etc", "home/agent", "mnt", "opt", "proc", "root", "run", "srv", "tmp", "usr"),
    *("var/lib", "var/log", "var/tmp", "var/cache"),
)
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/home/agent:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nagent:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/host.conf": "multi on\n",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/profile": "umask 022\n",
    "etc/os-release": 'NAME="Rorqual sandbox on the host\'s /usr"\nID=rorqual\n',
}
_COPIED = ("etc/ld.so.cache",)  # where the host's libraries lie
_LINK_FOLDERS = ("etc/alternatives",)  # names of programs, e.g. awk; only links are taken


def host_root() -> tuple[Path, list[str]]:
    """A folder to stack on, made once for each state of this machine, and bwrap's options that show the programs."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in _MERGED:
        path = Path("/", name)
        if path.is_dir() and not path.is_symlink():
            options += ["--ro-bind", str(path), str(path)]
    plan, digest = _plan_of(_marks())
    target = cache_folder() / "host-root" / digest
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _fill(scratch, plan)
            os.rename(scratch, target)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            if not target.exists():  # another process was quicker
                raise
    return target, options


def _marks() -> tuple[int, ...]:
    """Changes when the plan may have changed."""
    marks = []
    for path in ("/", *(f"/{name}" for name in (*_COPIED, *_LINK_FOLDERS))):
        try:
            marks.append(os.stat(path).st_mtime_ns)
        except OSError:
            marks.append(0)
    return tuple(marks)


@lru_cache(maxsize=1)
def _plan_of(marks: tuple[int, ...]) -> tuple[list[tuple[str, str, bytes]], str]:
    """The plan and its digest; reading it takes longer than all else of a start."""
    plan = _plan()
    return plan, hashlib.sha256(repr(plan).encode()).hexdigest()[:24]


def _plan() -> list[tuple[str, str, bytes]]:
    """(path, kind, content) of everything below the root."""
    plan: list[tuple[str, str, bytes]] = [(name, "folder", b"") for name in _FOLDERS]
    for name in _MERGED:
        path = Path("/", name)
        if path.is_symlink():
            plan.append((name, "link", os.readlink(path).lstrip("/").encode()))
        elif path.is_dir():
            plan.append((name, "folder", b""))
    plan += [(name, "file", text.encode()) for name, text in _FILES.items()]
    for name in _COPIED:
        path = Path("/", name)
        if path.is_file():
            plan.append((name, "file", path.read_bytes()))
    for name in _LINK_FOLDERS:
        folder = Path("/", name)
        if folder.is_dir():
            plan.append((name, "folder", b""))
            links = sorted(path for path in folder.iterdir() if path.is_symlink())
            plan += [(f"{name}/{path.name}", "link", os.fsencode(os.readlink(path))) for path in links]
    return plan


def _fill(root: Path, plan: list[tuple[str, str, bytes]]) -> None:
    root.chmod(0o755)
    for name, kind, content in plan:
        path = root / name
        if kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
        elif kind == "link":
            os.symlink(os.fsdecode(content), path)
        else:
            path.write_bytes(content)
            path.chmod(0o644)
    for folder, names, _ in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755)
