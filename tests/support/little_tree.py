"""Small trees of files for tests of layers, and how to tell that two are the same."""

import os
import stat
from pathlib import Path


def make_tree(top: Path) -> Path:
    """A root file system in miniature: every kind of file that a layer keeps."""
    for folder in ("etc", "home/agent", "usr/bin", "usr/lib/deep/er", "var/empty", "odd \n name"):
        (top / folder).mkdir(parents=True)
    (top / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (top / "etc/empty").touch()
    for size in (1, 2048, 2049, 4095, 4096, 4097, 70_000):
        (top / "usr/lib" / f"f{size}").write_bytes(bytes(i * 7 % 251 for i in range(size)))
    (top / "usr/bin/tool").write_text("#!/bin/sh\n")
    (top / "usr/bin/tool").chmod(0o755)
    os.link(top / "usr/bin/tool", top / "usr/bin/same")
    os.symlink("../usr/bin/tool", top / "etc/link")
    os.symlink("/etc/shadow", top / "usr/lib/deep/absolute")
    os.mkfifo(top / "var/pipe", 0o640)
    (top / os.fsdecode(b"odd \n name/\xff\xfe")).write_text("bytes for a name")
    with open(top / "home/agent/sparse", "wb") as file:
        file.truncate(3 << 20)
        file.seek(2 << 20)
        file.write(b"in the middle")
    (top / "var/empty").chmod(0o500)
    (top / "etc/empty").chmod(0o000)
    for number, path in enumerate(sorted(top.rglob("*"))):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + number), follow_symlinks=False)
    return top


def described(top: Path, *, owners: bool = True, times: bool = True) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that a layer promises to keep, by path."""
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[tuple[int, int], str] = {}
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        name = str(path.relative_to(top))
        first = inodes.setdefault((status.st_dev, status.st_ino), name)
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes() if status.st_mode & 0o400 or os.geteuid() == 0 else None
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode):
            content = status.st_rdev
        xattrs: dict[str, bytes] = {}
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            try:
                names = [one for one in os.listxattr(path) if one.startswith("user.")]
                xattrs = {
                    one: os.getxattr(path, one) for one in names if one.endswith("opaque") or ".overlay." not in one
                }
            except PermissionError:
                pass
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        mode = None if stat.S_ISLNK(status.st_mode) or stat.S_ISCHR(status.st_mode) else oct(status.st_mode)
        time = status.st_mtime_ns if times and name != "." else None
        owner = (status.st_uid, status.st_gid) if owners else None
        found[name] = (mode, size, content, time, owner, first if status.st_nlink > 1 else None, xattrs)
    return found
