"""The guest kernel: one the user names, one kept from before, this machine's own, or the distribution's package.

A package is fetched with `apt-get download` and unpacked with `dpkg-deb`, neither of which needs root or installs
anything. The kernel is kept uncompressed (an ELF file, entered through its PVH note): unpacking itself takes an
emulated machine a second. No kernel is part of this repository; scripts/build_guest_kernel.sh builds a smaller one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.folders import cache_folder
from rorqual.sandbox.vm.modules import decompress_zstd

PACKAGES = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic")
"""Of Debian and Ubuntu, the first that is offered; all are names that stand for the newest build."""
DOWNLOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class GuestKernel:
    """A kernel to boot. image: ELF or bzImage; modules: its /lib/modules/VERSION, None when all is built in."""

    image: Path
    modules: Path | None
    version: str
    digest: str


def find() -> GuestKernel | None:
    """The kernel that would be used, without fetching one: $RORQUAL_KERNEL, a kept one, or this machine's own.

    Raises: SandboxError when RORQUAL_KERNEL names something that is no kernel.
    """
    named = os.environ.get("RORQUAL_KERNEL")
    if named:
        modules = os.environ.get("RORQUAL_KERNEL_MODULES")
        return _prepared(Path(named), Path(modules) if modules else None)
    kept = sorted(kernels_folder().glob("*/kernel.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for listing in kept:
        data = json.loads(listing.read_text())
        modules_folder = listing.parent / "modules"
        image = listing.parent / "vmlinux"
        if image.exists():
            return GuestKernel(image, modules_folder if data["modules"] else None, data["version"], data["digest"])
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        modules_folder = Path("/lib/modules", image.name.removeprefix("vmlinuz-"))
        if os.access(image, os.R_OK) and (modules_folder / "kernel").is_dir():
            return _prepared(image, modules_folder)
    return None


def obtain() -> GuestKernel:
    """The kernel to use; fetched from the distribution when there is none yet (some 35 MB, once).

    Raises: SandboxError when none is there and none can be fetched.
    """
    return find() or _download()


def missing() -> str | None:
    """Why there can be no guest kernel here and what would help, or None. Cheap: fetches nothing."""
    if find() is not None or (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    return (
        "no guest kernel: neither RORQUAL_KERNEL nor a readable /boot/vmlinuz-* with modules, and no apt-get to fetch "
        "one; set RORQUAL_KERNEL=/path/vmlinuz and RORQUAL_KERNEL_MODULES=/lib/modules/VERSION"
    )


def kernels_folder() -> Path:
    """Where unpacked kernels are kept."""
    return cache_folder() / "kernels"


def uncompressed(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage; an ELF file as it is. Raises: SandboxError when it is neither.

    Source: the kernel's Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length).
    """
    if image[:4] == b"\x7fELF":
        return image
    if len(image) < 0x260 or image[0x202:0x206] != b"HdrS":
        raise SandboxError("this is no x86 kernel: neither an ELF file nor a bzImage. Name a vmlinux or vmlinuz.")
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    size = struct.unpack("<I", payload[-4:])[0]  # every compressor but gzip has the size appended
    try:
        if payload[:4] == b"\x28\xb5\x2f\xfd":
            return decompress_zstd(payload, size)
        if payload[:6] == b"\xfd7zXZ\0":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
        if payload[:3] == b"\x5d\0\0":
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload)
        if payload[:2] == b"\x1f\x8b":
            return gzip.decompress(payload)
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise SandboxError(f"the kernel's compressed part is damaged: {error}.") from error
    raise SandboxError(f"the kernel is compressed in an unknown way ({payload[:4].hex()}). Name its vmlinux instead.")


def _prepared(image: Path, modules: Path | None) -> GuestKernel:
    """A kernel outside of our folder, unpacked into it once."""
    try:
        raw = image.read_bytes()
    except OSError as error:
        raise SandboxError(
            f"the guest kernel {image} cannot be read: {error.strerror}. Check RORQUAL_KERNEL."
        ) from error
    digest = hashlib.sha256(raw).hexdigest()
    target = kernels_folder() / f"named-{digest[:16]}"
    version = _version(raw) or image.name
    if not (target / "vmlinux").exists():
        _put(target, lambda scratch: (scratch / "vmlinux").write_bytes(uncompressed(raw)))
    if modules is None:
        beside = Path("/lib/modules", version)
        modules = beside if (beside / "kernel").is_dir() else None
    return GuestKernel(target / "vmlinux", modules, version, digest)


def _version(image: bytes) -> str | None:
    """What `uname -r` would say, from the header of a bzImage or the banner in an ELF file."""
    if image[0x202:0x206] == b"HdrS":
        at = struct.unpack_from("<H", image, 0x20E)[0] + 0x200
        return image[at : image.index(b"\0", at)].split(b" ")[0].decode("ascii", "replace")
    found = re.search(rb"Linux version (\S+) ", image)
    return found[1].decode("ascii", "replace") if found else None


def _download() -> GuestKernel:
    if missing():
        raise SandboxError(f"{missing()}.")
    with tempfile.TemporaryDirectory(prefix="rorqual-kernel-") as scratch:
        for package in PACKAGES:
            built = _depends(package, ("linux-image-",))
            if built:
                break
        else:
            raise SandboxError(
                f"apt knows none of the kernel packages {', '.join(PACKAGES)}. Run `apt-get update` as root once, or "
                "set RORQUAL_KERNEL."
            )
        wanted = [*built, *_depends(built[0], ("linux-modules-",))]
        extra = built[0].replace("linux-image-", "linux-modules-extra-")
        _run(["apt-get", "download", *wanted], Path(scratch))
        subprocess.run(["apt-get", "download", extra], cwd=scratch, capture_output=True, check=False)  # Ubuntu's
        root = Path(scratch, "root")
        for file in sorted(Path(scratch).glob("*.deb")):
            _run(["dpkg-deb", "-x", str(file), str(root)], Path(scratch))
        return _keep(root, built[0])


def _keep(root: Path, package: str) -> GuestKernel:
    images = sorted(root.glob("boot/vmlinuz-*"))
    if not images:
        raise SandboxError(f"the package {package} holds no kernel at boot/vmlinuz-*. Set RORQUAL_KERNEL.")
    version = images[0].name.removeprefix("vmlinuz-")
    raw = images[0].read_bytes()
    folder = next(
        (path for path in (root / "lib/modules" / version, root / "usr/lib/modules" / version) if path.is_dir()), None
    )
    digest = hashlib.sha256(raw).hexdigest()
    target = kernels_folder() / version

    def fill(scratch: Path) -> None:
        (scratch / "vmlinux").write_bytes(uncompressed(raw))
        if folder is not None:
            shutil.copytree(folder, scratch / "modules", symlinks=True)
        listing = {"version": version, "digest": digest, "package": package, "modules": folder is not None}
        (scratch / "kernel.json").write_text(json.dumps(listing))

    _put(target, fill)
    return GuestKernel(target / "vmlinux", target / "modules" if folder else None, version, digest)


def _depends(package: str, beginnings: tuple[str, ...]) -> list[str]:
    """Packages with these beginnings that `package` depends on; none when it is unknown."""
    done = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False)
    words = re.findall(r"^\s*(?:Pre)?Depends: (\S+)$", done.stdout, re.MULTILINE)
    return [word for word in words if word.startswith(beginnings) and not word.startswith("<")][:1]


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"fetching the guest kernel took more than {DOWNLOAD_TIMEOUT_S:g} s: {error}.") from error
    if done.returncode:
        raise SandboxError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}\n  Without a network, set RORQUAL_KERNEL to a "
            "kernel that is here."
        )


def _put(target: Path, fill: object) -> None:
    """Fill a new folder and put it in place by one rename; another process may have been quicker."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    try:
        fill(scratch)  # type: ignore[operator]
        scratch.chmod(0o755)
        os.rename(scratch, target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
