"""Kernel modules: which files a guest needs, and in which order they must be loaded.

A distribution's package has no `modules.dep` (it is made on installation), so the dependencies are read where the build
put them: the `.modinfo` section of each module. Left out: signatures (they stay in place and the kernel checks them).
"""

from __future__ import annotations

import ctypes
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import SandboxError

SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


@dataclass(frozen=True)
class Module:
    """One module, uncompressed. name: with underscores, as `lsmod` shows it."""

    name: str
    data: bytes


def in_order(folder: Path, wanted: Sequence[str]) -> list[Module]:
    """Modules below `folder` (`/lib/modules/VERSION`) with everything they depend on, each after its dependencies.

    Those built into the kernel are left out. Raises: SandboxError for one that is neither a file nor built in.
    """
    files = {_module_name(path): path for path in sorted(folder.rglob("*.ko*")) if path.name.endswith(SUFFIXES)}
    built_in = _built_in(folder)
    done: dict[str, Module] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in done or name in built_in:
            return
        if name in above:
            raise SandboxError(f"kernel modules depend on each other in a ring: {' -> '.join([*above, name])}.")
        if name not in files:
            raise SandboxError(
                f"the guest kernel in {folder} lacks the module {name}, which the sandbox needs; "
                "take a kernel package with all modules, or name another with RORQUAL_KERNEL."
            )
        data = _read(files[name])
        for needed in dependencies(data, name):
            visit(needed, (*above, name))
        done[name] = Module(name, data)

    for name in wanted:
        visit(name.replace("-", "_"), ())
    return list(done.values())


def dependencies(data: bytes, name: str) -> list[str]:
    """What a module's `.modinfo` section says it depends on. Raises: SandboxError when it is no ELF module."""
    info = _section(data, b".modinfo", name)
    for item in info.split(b"\0"):
        if item.startswith(b"depends="):
            return [part.replace("-", "_") for part in item[8:].decode().split(",") if part]
    return []


def decompress_zstd(data: bytes, size_hint: int | None = None) -> bytes:
    """One zstd frame, through the system's library or its command. Raises: SandboxError when there is neither."""
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return _zstd_command(data)
    library.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
    library.ZSTD_findFrameCompressedSize.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
    library.ZSTD_getFrameContentSize.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    frame = library.ZSTD_findFrameCompressedSize(data, len(data))
    declared = library.ZSTD_getFrameContentSize(data, len(data))
    size = size_hint if declared >= 1 << 63 else declared  # the two highest values mean "unknown" and "no frame"
    if library.ZSTD_isError(frame) or size is None or size > 1 << 30:
        raise SandboxError("a zstd frame of the kernel package is damaged, or does not say its size.")
    out = ctypes.create_string_buffer(size)
    written = library.ZSTD_decompress(out, size, data, frame)
    if library.ZSTD_isError(written):
        raise SandboxError("a zstd frame of the kernel package is damaged.")
    return out.raw[:written]


def _zstd_command(data: bytes) -> bytes:
    command = shutil.which("zstd")
    if command is None:
        raise SandboxError("the kernel package is compressed with zstd: install libzstd1 or zstd.")
    done = subprocess.run([command, "-dc"], input=data, capture_output=True, check=False)
    if not done.stdout:
        raise SandboxError(f"zstd could not read a part of the kernel package: {done.stderr.decode()[:200]}")
    return done.stdout


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return decompress_zstd(data) if path.suffix == ".zst" else data


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _built_in(folder: Path) -> set[str]:
    listing = folder / "modules.builtin"
    if not listing.exists():
        return set()
    return {_module_name(Path(line)) for line in listing.read_text().split()}


def _section(data: bytes, wanted: bytes, name: str) -> bytes:
    """The bytes of one section of a 64-bit little-endian ELF file."""
    try:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no 64-bit ELF file")
        table, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", data, 40)
        headers = [struct.unpack_from("<IIQQQQ", data, table + entry_size * index) for index in range(count)]
        names_at = headers[names_index][4]
        for name_at, _, _, _, offset, size in headers:
            end = data.index(b"\0", names_at + name_at)
            if data[names_at + name_at : end] == wanted:
                return data[offset : offset + size]
    except (struct.error, ValueError, IndexError) as error:
        raise SandboxError(f"the kernel module {name} is damaged: {error}.") from error
    return b""
