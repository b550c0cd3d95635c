"""What sandboxes of one data folder have on this machine, so that a test can see that nothing is left."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def traces_of(home: Path) -> list[str]:
    """Processes, mounts, control groups, loop devices and files (with sockets) of the sandboxes below `home`."""
    return [
        *(f"process {one}" for one in _processes(home)),
        *(f"mount {one}" for one in _mounts(home)),
        *(f"control group {one}" for one in _groups(home)),
        *(f"loop device {one}" for one in _loops(home)),
        *(f"file {path}" for path in _files(home)),
    ]


def settled(look: Callable[[], list[str]], within_s: float = 5.0) -> list[str]:
    """What is left once the kernel had a moment to take away what is dying."""
    end = time.monotonic() + within_s
    while (left := look()) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def ids_below(home: Path) -> list[str]:
    """Every sandbox that ever had its folder there."""
    top = home / "sandboxes"
    return [path.name for folder in (top, top / ".gone") if folder.is_dir() for path in folder.glob("[!.]*")]


def _processes(home: Path) -> Iterable[str]:
    """Those that name a folder or a sandbox of this home, or work in it; and agents without a keeper."""
    names = [str(home), *(name for name in ids_below(home))]
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
            folder = os.readlink(path / "cwd") if os.access(path / "cwd", os.R_OK) else ""
        except OSError:
            continue
        orphan = " serve --listen " in text and not _kept(int(path.name))
        if int(path.name) != os.getpid() and (orphan or any(name in text or name in folder for name in names)):
            yield f"{path.name} {text[:300]}"


def _kept(pid: int) -> bool:
    """Whether a keeper is among its ancestors."""
    while pid > 1:
        try:
            if (Path("/proc") / str(pid) / "comm").read_text().strip() == "keeper":
                return True
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return True  # it just ended
    return False


def _mounts(home: Path) -> Iterable[str]:
    return (line.split()[4] for line in _lines(Path("/proc/self/mountinfo")) if str(home) in line)


def _groups(home: Path) -> Iterable[str]:
    ids = set(ids_below(home))
    for top, folders, _ in os.walk("/sys/fs/cgroup"):  # other tests' groups may go meanwhile, which it passes over
        if os.path.basename(top) == "rorqual":
            yield from (os.path.join(top, name) for name in folders if name in ids)


def _loops(home: Path) -> Iterable[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        if any(str(home) in line for line in _lines(path)):
            yield path.parts[3]


def _files(home: Path) -> Iterable[Path]:
    """All but the notes about sandboxes that were, which are dropped after a day."""
    top = home / "sandboxes"
    for path in top.rglob("*") if top.is_dir() else ():
        if path.relative_to(top).parts[0] not in (".gone", ".making"):
            yield path


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
