"""Templates: a machine that was booted once, up to the moment its agent waits for its first client, and then saved.

Every sandbox with the same kernel, layers, memory, processors and disk starts from it in a fraction of the boot's time.
No code of a user ever ran in it, it has no secret, and its agent belongs to nobody yet.

    <cache>/templates/<key>/     manifest.json, disk (raw, sparse), state, template-memory (sparse; in the state itself
                                 where machines cannot share it); a template is there once the manifest is
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual import log
from rorqual.errors import SandboxError
from rorqual.folders import cache_folder
from rorqual.sandbox.spec import Limits
from rorqual.sandbox.vm import boot, saved, share
from rorqual.sandbox.vm.control import Control
from rorqual.sandbox.vm.machine import Disk, Machine, fingerprint

VERSION = 2
KEPT = 12
"""Templates beyond this many are removed, those longest unused first."""
_logger = log.get(__name__)


@dataclass(frozen=True)
class Template:
    """A saved machine. boot_s: how long its boot took."""

    folder: Path
    fingerprint: dict[str, str]
    boot_s: float

    @property
    def disk(self) -> Path:
        """Its writable disk as it was when it was saved."""
        return self.folder / "disk"

    @property
    def state(self) -> Path:
        """Its devices, and its memory where that is not in a file of its own."""
        return self.folder / "state"

    @property
    def memory(self) -> Path | None:
        """Its memory, which machines map; None where it is in the state."""
        path = self.folder / share.NAME
        return path if path.exists() else None

    @property
    def is_tried(self) -> bool:
        """Whether a machine from it was found to keep time."""
        return (self.folder / "tried").exists()

    def mark_tried(self) -> None:
        """Remember that."""
        with suppress(OSError):  # it may have been removed meanwhile
            (self.folder / "tried").touch()

    def discard(self) -> None:
        """Remove it, so that the next machine boots once more; machines that were started from it go on."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def folder() -> Path:
    """Where templates are kept."""
    return cache_folder() / "templates"


def missing() -> str | None:
    """What is needed to make one and is not here, or None."""
    if _mkfs() is None:
        return "mkfs.ext4 is not installed; `apt install e2fsprogs` brings it"
    return None


async def obtain(machine: Machine, digests: tuple[str, str], limits: Limits, timeout_s: float) -> Template:
    """The template for this machine, booted and saved now if there is none yet.

    digests: of kernel and initramfs. Of `machine` its folder and disk are not used.
    Raises: SandboxError when it does not boot within `timeout_s`.
    """
    marks = fingerprint(machine, *digests)
    named = repr((VERSION, machine.sharing is not None, sorted(marks.items()), limits.disk_mb, limits.inodes))
    key = hashlib.sha256(named.encode()).hexdigest()[:32]
    place = folder() / key
    found = _read(place)
    if found is not None:
        return found
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    with await asyncio.to_thread(_locked_context, key) as _:
        found = _read(place)
        if found is not None:
            return found
        await asyncio.to_thread(_forget_old)
        return await _make(machine, marks, limits, place, timeout_s)


async def _make(machine: Machine, marks: dict[str, str], limits: Limits, place: Path, timeout_s: float) -> Template:
    home = folder() / f".new-{secrets.token_hex(6)}"
    home.mkdir(mode=0o700)
    uid = boot.new_uid()
    started = None
    begin = time.monotonic()
    try:
        inside = boot.own_folder(home, uid)
        disk = inside / "disk"
        await asyncio.to_thread(make_disk, disk, limits)
        boot.hand_over(disk, uid)
        (home / "lifetime").write_text(
            f"{int((time.clock_gettime(time.CLOCK_BOOTTIME) + timeout_s + 30) * 1000)} lifetime\n"
        )
        memory = inside / share.NAME if machine.sharing is not None else None
        if memory is not None:
            await asyncio.to_thread(_make_memory, memory, machine.memory_mb << 20, uid)
        booting = replace(machine, folder=inside, disk=Disk((disk,), None), incoming=False, console=True, memory=memory)
        started = await asyncio.to_thread(
            boot.start, booting, home, uid, f"template-{home.name[5:]}", float(machine.cpus)
        )
        qmp = await boot.monitor(inside, home, 15.0)
        async with qmp:
            await _wait(inside, home, timeout_s)
            took = time.monotonic() - begin
            await saved.save(qmp, home / "state", timeout_s, memory_apart=memory is not None)
        left = await boot.end_later(started)
        started = None
        if left:
            raise SandboxError(f"the machine of a new template could not be ended: {', '.join(left)}.")
        return await asyncio.to_thread(_put, home, inside, place, marks, took)
    finally:
        if started is not None:
            await asyncio.shield(boot.end_later(started))
        shutil.rmtree(home, ignore_errors=True)


async def _wait(inside: Path, home: Path, timeout_s: float) -> None:
    try:
        async with await Control.open(inside) as control:
            await control.wait_ready(timeout_s)
    except SandboxError as error:
        said = ""
        with suppress(OSError):
            said = (inside / "console").read_text(errors="replace").strip()[-800:]
        raise SandboxError(
            f"the virtual machine did not boot: {error} {said or boot.last_words(home) or 'Its console is empty.'}"
        ) from error
    await asyncio.sleep(0.1)  # the agent said nothing yet, but should have come to rest


def _make_memory(path: Path, size: int, uid: int | None) -> None:
    with open(path, "xb") as file:
        file.truncate(size)
    boot.hand_over(path, uid)


def _put(home: Path, inside: Path, place: Path, marks: dict[str, str], took: float) -> Template:
    made = home / "made"
    made.mkdir(mode=0o755)
    for path in (inside / "disk", home / "state", inside / share.NAME):
        if path.exists():
            os.rename(path, made / path.name)
    for path in made.iterdir():
        if os.geteuid() == 0:
            os.chown(path, 0, 0)
        path.chmod(0o444)
    (made / "manifest.json").write_text(json.dumps({"fingerprint": marks, "boot_s": took}))
    with suppress(OSError):
        os.rename(made, place)
    found = _read(place)
    if found is None:
        raise SandboxError(f"the template {place} could not be put in place. Is the disk full?")
    _logger.info("virtual machine booted in %.1f s and saved as a template", took)
    return found


def _read(place: Path) -> Template | None:
    try:
        data = json.loads((place / "manifest.json").read_text())
        os.utime(place)
        return Template(place, data["fingerprint"], data["boot_s"])
    except (OSError, ValueError, KeyError):
        return None


def make_disk(path: Path, limits: Limits) -> None:
    """A new disk image with an empty ext4 file system of the limits' size and number of files. Raises: SandboxError."""
    mkfs = _mkfs()
    if mkfs is None:
        raise SandboxError(f"{missing()}.")
    with open(path, "xb") as file:
        file.truncate(limits.disk_mb << 20)
    inodes = max(64, min(limits.inodes, (limits.disk_mb << 20) // 1024))
    options = ["-q", "-F", "-m", "0", "-N", str(inodes), "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]
    features = "^has_journal,^resize_inode,^metadata_csum,^huge_file"
    done = subprocess.run([mkfs, *options, "-O", features, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SandboxError(f"mkfs.ext4 made no disk of {limits.disk_mb} MiB: {done.stderr.strip()[-300:]}")


def _mkfs() -> str | None:
    return shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")


@contextmanager
def _locked(key: str) -> Iterator[None]:
    with open(folder() / f".{key}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _locked_context:
    """The lock taken in a thread, so that the loop goes on while another process boots the same template."""

    def __init__(self, key: str) -> None:
        self._held = _locked(key)
        self._held.__enter__()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._held.__exit__(None, None, None)


def _forget_old() -> None:
    """Remove templates that nobody used for longest, and what an interrupted boot left."""
    for path in folder().glob(".new-*"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)
    ours = sorted(
        (path for path in folder().iterdir() if (path / "manifest.json").exists()), key=lambda p: p.stat().st_mtime
    )
    for path in ours[: max(0, len(ours) - KEPT + 1)]:
        (path / "manifest.json").unlink(missing_ok=True)  # running machines keep the files open
        shutil.rmtree(path, ignore_errors=True)
