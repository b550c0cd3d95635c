"""Machines of one shape share their template's memory: each maps the file privately and has pages of its own only where
it wrote. Loading one reads nothing but its devices.

Source: QEMU's migration capability x-ignore-shared, as Kata Containers' VM templating uses it. QEMU 8.2 and later maps
a file that it may only read (`readonly=on,rom=off`); for earlier ones `template_memory.c` is preloaded. Machines side
by side can time each other's use of shared pages (docs/sandbox-vm.md).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from os import replace
from pathlib import Path

from rorqual import log
from rorqual.folders import cache_folder
from rorqual.sandbox.agent.build import compiler

NAME = "template-memory"
"""Name of such a file, which `template_memory.c` knows."""
SOURCE = Path(__file__).with_name("template_memory.c")
_FLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE")
_logger = log.get(__name__)


@dataclass(frozen=True)
class Sharing:
    """How QEMU maps a file privately that it may only read: options of the backend, or a library to preload."""

    options: str = ""
    preload: Path | None = None


@lru_cache
def sharing(binary: str, version: str) -> Sharing | None:
    """The way for this QEMU; None where there is none, and each machine then loads all of its memory.

    version: what QEMU says of itself.
    """
    found = re.search(r"version (\d+)\.(\d+)", version)
    if found is None:
        return None
    numbers = int(found[1]), int(found[2])
    if numbers >= (8, 2):
        return Sharing(options=",readonly=on,rom=off")
    path = shutil.which(binary)
    if numbers < (7, 0) or path is None or not _is_dynamic(Path(path)):
        return None
    preload = _built()
    return None if preload is None else Sharing(preload=preload)


def is_in_memory(folder: Path) -> bool:
    """Whether files there take memory that cannot be had back, as on a tmpfs.

    A page that a machine writes where the file has a hole becomes a page of the file too: on a disk the kernel drops
    that one when it needs to, here the machine would pay for it twice.
    """
    kinds: dict[Path, str] = {}
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            kinds[Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), left.split()[4]))] = right.split()[0]
    except OSError:
        return False
    at = folder.resolve()
    return next((kinds[one] for one in (at, *at.parents) if one in kinds), "") in ("tmpfs", "ramfs")


def _is_dynamic(path: Path) -> bool:
    """Whether a program is loaded with libraries, so that one can be preloaded."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return head.startswith(b"\x7fELF") and b"/ld-linux" in head


def _built() -> Path | None:
    cc = compiler()
    if cc is None:
        return None
    text = SOURCE.read_bytes()
    target = cache_folder() / "agent" / sha256(repr((cc, _FLAGS)).encode() + text).hexdigest()[:24] / "preload.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "preload.so"
        command = [*cc, *_FLAGS, "-o", str(made), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            _logger.warning(
                "machines will not share their templates' memory: `%s` failed: %s",
                shlex.join(command),
                done.stderr.strip()[-500:],
            )
            return None
        made.chmod(0o755)
        replace(made, target)
    return target
