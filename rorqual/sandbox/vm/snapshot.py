"""Full snapshots: a machine's memory, its disk as a chain of images, and one manifest that names both by digest.

    <data>/snapshots/<id>/      manifest.json (mode 0600: it has the agent's key), state, disk0 (raw), disk1 ... (qcow2)

A snapshot is there once its manifest is. It is restored only where the fingerprint is the same: QEMU's version, board,
processor model, kernel, initramfs, layers. Its files are never written to; copies work on overlays. Who writes or reads
one holds a lock on its folder, which the kernel frees when that process dies, so a collector knows what is left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.folders import data_folder
from rorqual.sandbox.errors import SnapshotFailed
from rorqual.sandbox.images.objects import sync_folder

MAX_CHAIN = 24
_BLOCK = 1 << 16
_ID = re.compile(r"full-[0-9a-f]{16}")


@dataclass(frozen=True)
class Manifest:
    """What a full snapshot is. files: name -> `digest_of`; disks: names from the lowest up; secret: its agent's key."""

    id: str
    fingerprint: dict[str, str]
    disk_mb: int
    files: dict[str, str]
    disks: tuple[str, ...]
    secret: str

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return folder() / self.id

    @property
    def size_bytes(self) -> int:
        """Bytes its files take on the disk."""
        return sum((self.folder / name).stat().st_blocks * 512 for name in self.files)


class Draft:
    """A snapshot on its way: its id, and the folder that its files are written into.

    Use it as a context manager. Until the block ends no collector takes it, neither while it is written nor when it is
    whole and has no name yet. After an error, or when it did not become whole, nothing of it is left.
    """

    def __init__(self) -> None:
        self.id = f"full-{secrets.token_hex(8)}"
        self.folder = folder() / f".new-{self.id}"
        self._lock = -1

    def __enter__(self) -> Draft:
        self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            self.folder.mkdir(mode=0o755)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), self.folder.stat()):
                    return self
            os.close(self._lock)  # a collector came between the lines above

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            shutil.rmtree(folder() / self.id, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def folder(home: Path | None = None) -> Path:
    """Where full snapshots are kept: below the data folder `home`, the user's own by default."""
    return (home or data_folder()) / "snapshots"


def is_id(word: str) -> bool:
    """Whether this could be a full snapshot's id."""
    return _ID.fullmatch(word) is not None


@contextmanager
def reading(manifest: Manifest) -> Iterator[None]:
    """Keep collectors away from its files meanwhile. Raises: SandboxError when one was quicker."""
    try:
        lock = os.open(manifest.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        read(manifest.id)
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        read(manifest.id)
        yield
    finally:
        os.close(lock)


def collect(
    needed: Set[str], before: float, home: Path | None = None, *, dry_run: bool = False
) -> tuple[dict[str, int], int]:
    """Remove snapshots not in `needed`, made before `before` (seconds since 1970), that nobody writes or reads.

    Returns the bytes that each frees, by id (files that a machine shares free nothing yet), and how many half-written
    ones of dead processes went besides.
    """
    freed, halves = {}, 0
    top = folder(home)
    for path in sorted(top.iterdir()) if top.is_dir() else ():
        is_half = path.name.startswith((".new-full-", ".state-"))
        if not is_half and (not is_id(path.name) or path.name in needed):
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # it just went, or got its name
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_half and _made(path) >= before:
                continue
            if is_half and path.exists():  # not renamed since it was opened
                halves += 1
            elif not is_half:
                freed[path.name] = _bytes_of(path)
            if not dry_run:
                (path / "manifest.json").unlink(missing_ok=True) if path.is_dir() else path.unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
    return freed, halves


def sizes() -> dict[str, int]:
    """Bytes that each full snapshot takes on the disk, by id; what it shares with a living machine counts too."""
    top = folder()
    found = {}
    for path in sorted(top.iterdir()) if top.is_dir() else ():
        if is_id(path.name):
            found[path.name] = _bytes_of(path, shared=True)
    return found


def _made(path: Path) -> float:
    """When a snapshot became whole; what never did, or is half removed, counts as old."""
    try:
        return (path / "manifest.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_of(path: Path, shared: bool = False) -> int:
    found = 0
    for file in path.glob("*"):
        with suppress(FileNotFoundError):
            status = file.stat()
            if stat.S_ISREG(status.st_mode) and (shared or status.st_nlink == 1):
                found += status.st_blocks * 512
    return found


def read(identity: str) -> Manifest:
    """The manifest of a snapshot. Raises: SandboxError when there is none or it cannot be read."""
    if not _ID.fullmatch(identity):
        raise SandboxError(f"{identity[:80]!r} is no full snapshot's id; those look like full-0123456789abcdef.")
    try:
        data = json.loads((folder() / identity / "manifest.json").read_text())
        return Manifest(**{**data, "disks": tuple(data["disks"])})
    except FileNotFoundError:
        raise SandboxError(f"there is no full snapshot {identity} in {folder()}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise SandboxError(f"the manifest of full snapshot {identity} cannot be read: {error}. Remove it.") from error


def check(manifest: Manifest, here: dict[str, str]) -> None:
    """Whether this machine may restore it. Raises: SandboxError naming every difference of the fingerprints."""
    theirs = manifest.fingerprint
    names = sorted(set(theirs) | set(here))
    differences = [
        f"{name}: {theirs.get(name)} then, {here.get(name)} now" for name in names if theirs.get(name) != here.get(name)
    ]
    if differences:
        raise SandboxError(
            f"full snapshot {manifest.id} was taken under other conditions and is not restored:\n  "
            + "\n  ".join(differences)
            + "\n  Restore it where these are the same, or start from a disk snapshot, which has no such bounds."
        )


def verify(manifest: Manifest) -> None:
    """Read every file and compare its digest; what was verified and did not change since is believed.

    Raises: SandboxError naming the file that is damaged or missing.
    """
    for name, digest in manifest.files.items():
        path = manifest.folder / name
        try:
            status = path.stat()
            mark = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            marked = manifest.folder / f".{name}.verified"
            if marked.exists() and marked.read_text() == mark:
                continue
            found = digest_of(path)
        except FileNotFoundError:
            raise SandboxError(f"full snapshot {manifest.id} lacks its file {name}. Take another one.") from None
        if found != digest:
            raise SandboxError(
                f"full snapshot {manifest.id} is damaged: {name} has the digest {found[:16]}, not {digest[:16]}. It is "
                "not restored. Take another one, or restore its files from a copy."
            )
        marked.write_text(mark)


def store(
    state: Path,
    disks: Sequence[Path],
    fingerprint: dict[str, str],
    disk_mb: int,
    secret: str,
    *,
    draft: Draft | None = None,
) -> Manifest:
    """Take the files of a machine that stands still into a new snapshot, durable and verified.

    state: moved; disks: the chain from the lowest up, linked where they are never written and copied for the last.
    draft: what it becomes; with one it is out of a collector's reach until that ends.
    Raises: SnapshotFailed; nothing is kept then.
    """
    if draft is None:
        with Draft() as draft:
            return store(state, disks, fingerprint, disk_mb, secret, draft=draft)
    if len(disks) > MAX_CHAIN:
        raise SnapshotFailed(
            f"this machine's disk is a chain of {len(disks)} snapshots, more than {MAX_CHAIN}. Take a disk snapshot "
            "and go on from that."
        )
    identity, scratch = draft.id, draft.folder
    target = folder() / identity
    try:
        os.replace(state, scratch / "state")
        names = [f"disk{number}" for number in range(len(disks))]
        for name, path in zip(names, disks, strict=True):
            if path == disks[-1]:
                _copy(path, scratch / name)
            else:
                link_or_copy(path, scratch / name)
        for name in ("state", *names):
            _settle(scratch / name)
        files = {name: digest_of(scratch / name) for name in ("state", *names)}
        manifest = Manifest(identity, fingerprint, disk_mb, files, tuple(names), secret)
        with open(os.open(scratch / "manifest.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(manifest), file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(scratch, target)
        sync_folder(target)
        sync_folder(folder())
        verify(manifest)
        return manifest
    except OSError as error:
        raise SnapshotFailed(f"the snapshot could not be stored in {folder()}: {error}. Nothing was kept.") from error


def remove(identity: str) -> None:
    """Remove a snapshot; machines started from it go on. Raises: SandboxError when there is none."""
    place = read(identity).folder
    (place / "manifest.json").unlink()
    shutil.rmtree(place, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name of a file that nobody writes to, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        _copy(source, target)


def digest_of(path: Path) -> str:
    """SHA-256 over the size and every 64 KiB block that has anything in it, with its place: holes cost nothing."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        found.update(size.to_bytes(8, "little"))
        at = 0
        while at < size:
            try:
                at = max(at, os.lseek(file.fileno(), at, os.SEEK_DATA) // _BLOCK * _BLOCK)
            except OSError:
                break  # a hole up to the end
            block = os.pread(file.fileno(), _BLOCK, at)
            if block.count(0) != len(block):
                found.update(at.to_bytes(8, "little"))
                found.update(block)
            at += _BLOCK
    return found.hexdigest()


def _copy(source: Path, target: Path) -> None:
    """A copy that keeps holes; shares blocks where the file system can."""
    with open(source, "rb") as old, open(target, "xb") as new:
        try:
            fcntl.ioctl(new, 0x40049409, old.fileno())  # FICLONE
            return
        except OSError:
            pass
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                begin = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:
                return  # a hole up to the end
            at = os.lseek(old.fileno(), begin, os.SEEK_HOLE)
            while begin < at:
                done = os.copy_file_range(old.fileno(), new.fileno(), at - begin, begin, begin)
                if not done:
                    break
                begin += done


def _settle(path: Path) -> None:
    """Owned by us, written by nobody, on the disk."""
    if os.geteuid() == 0:
        os.chown(path, 0, 0)
    path.chmod(0o444)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
