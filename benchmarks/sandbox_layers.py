"""How much of an image a task reads from where layers lie: an image of this machine's packages, and the accounting.

The image is mounted and its pages come in as they are asked for. What came is counted where it arrives, in the page
cache of the layer's one file: the file's pages are dropped, the task runs in a new container, and `mincore` says which
pages are there. Read-ahead counts, since it would cross the network too. It is a lower bound only where memory is so
short that pages went again. Dropping and looking need no rights beyond the file's owner's; mounting needs root.

Not in the share: a machine verifies a layer once, whole, before it mounts it for the first time (`docs/images.md`);
`verified_bytes` says how much that read.
"""

import ctypes
import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from rorqual.sandbox.images.base import BASE
from rorqual.sandbox.images.erofs import Attributes, Writer
from rorqual.sandbox.images.store import Store

PACKAGES = (*BASE, "python3", "perl", "mawk", "git", "make", "patch")
"""What an agent's image has, beside all that the distribution calls essential or required."""
TASKS = {
    "shell": "cd /tmp; seq 1 20000 | sed 's/7/x/g' | grep x | sort -r > out; tar cf out.tar out; wc -l < out",
    "text": "cd /tmp; seq 1 5000 > n; awk '{s += $1} END {print s}' n; find /etc -name '*.conf' | wc -l; gzip n",
    "python": "cd /tmp; python3 -c 'import csv, json, re, statistics; print(json.dumps(statistics.mean(range(100))))'",
    "tests": "cd /tmp; printf 'import unittest\\nclass T(unittest.TestCase):\\n def test(self): assert 1 + 1 == 2\\n' "
    "> t.py; python3 -m unittest t",
    "perl": "perl -e 'my %h; $h{$_ % 7}++ for 1..9999; print join(q(,), map {qq($_=$h{$_})} sort keys %h)'",
}
"""Small tasks of the kinds that agents are given, by what they mostly use."""
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def packages_here() -> list[str]:
    """PACKAGES, what is essential or required, and all that they depend on, as they are installed on this machine.

    Raises: SystemExit where packages are not Debian's.
    """
    if shutil.which("dpkg-query") is None:
        raise SystemExit("P5 makes its image of this machine's Debian packages; elsewhere name one with --image.")
    form = "${Package}\t${Essential}\t${Priority}\t${Depends}, ${Pre-Depends}\n"
    told = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    rows = {name: rest for name, *rest in (line.split("\t") for line in told.splitlines())}
    todo = [name for name, (essential, priority, _) in rows.items() if essential == "yes" or priority == "required"]
    todo += [name for name in PACKAGES if name in rows]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found and name in rows:
            found.add(name)
            clauses = (clause.split("|")[0].split("(")[0].split(":")[0].strip() for clause in rows[name][2].split(","))
            todo += [clause for clause in clauses if clause]
    return sorted(found)


def _files(packages: list[str]) -> Iterator[Path]:
    """Paths of these packages, folders before what they hold, with /bin and the like where they really lie."""
    told = subprocess.run(["dpkg-query", "-L", *packages], capture_output=True, text=True, check=True).stdout
    seen: set[Path] = set()
    for line in sorted(set(told.splitlines())):
        if line.startswith("/") and line != "/.":
            path = Path(line)
            if len(path.parts) > 1 and path.parts[1] in _MERGED and Path("/", path.parts[1]).is_symlink():
                path = Path("/usr", *path.parts[1:])
            if path not in seen and os.path.lexists(path):
                seen.add(path)
                yield path


def make_image(store: Store, name: str) -> str:
    """An image of this machine's packages, as one layer; returns the layer's digest."""
    chosen = Path("/etc/alternatives")
    links = (path for path in Path("/usr/bin").iterdir() if path.is_symlink() and path.readlink().parent == chosen)
    files = sorted({*_files(packages_here()), *chosen.glob("*"), *links, Path("/etc/ld.so.cache")})

    def build(writer: Writer) -> None:
        for path in files:
            status = path.lstat()
            inside = tuple(map(os.fsencode, path.parts[1:]))
            attributes = Attributes(stat.S_IMODE(status.st_mode) & 0o1777, mtime_ns=status.st_mtime_ns)
            if stat.S_ISDIR(status.st_mode):
                writer.folder(inside, attributes)
            elif stat.S_ISLNK(status.st_mode):
                writer.symlink(inside, attributes, os.fsencode(os.readlink(path)))
            elif stat.S_ISREG(status.st_mode) and path.name not in ("shadow", "gshadow"):
                writer.regular(inside, attributes, _pieces(path))
        for link in _MERGED:
            if Path("/", link).is_symlink():
                writer.symlink((link.encode(),), Attributes(0o777), os.fsencode(os.readlink(f"/{link}")))
        for folder, mode in (("home/agent", 0o755), ("tmp", 0o1777), ("proc", 0o755), ("dev", 0o755), ("run", 0o755)):
            writer.folder(tuple(folder.encode().split(b"/")), Attributes(mode, uid=1000 if "agent" in folder else 0))
        users = b"root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/home/agent:/bin/sh\n"
        writer.regular((b"etc", b"passwd"), Attributes(0o644), [users])
        writer.finish()

    digest = store.add(build, kind="base")
    store.name(name, [digest])
    return digest


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def drop_pages(file: Path) -> None:
    """Let the system forget a file's pages, those that no mount maps."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes(file: Path) -> int:
    """How much of a file the page cache holds. Raises: OSError."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.addressof(view := ctypes.c_char.from_buffer(mapped))
        failed = _libc.mincore(start, size, pages)
        del view
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return min(size, sum(page & 1 for page in pages) * mmap.PAGESIZE)
