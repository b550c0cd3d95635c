"""Builds the guest agent with the system's compiler at first use.

The program lies in the user's cache folder under a hash of its sources, flags and compiler, so it is rebuilt when any
of them changes; a finished build is put in place by one rename, so two processes may build at the same time.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.folders import cache_folder

FOLDER = Path(__file__).parent
FLAGS = ("-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2")


def compiler() -> list[str] | None:
    """The C compiler that would be used, as a command: $CC (arguments allowed), else cc, gcc or clang from PATH."""
    named = os.environ.get("CC")
    for command in [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0]) if command else None
        if found:
            return [found, *command[1:]]
    return None


def agent_binary(*defines: str) -> Path:
    """The built agent; `defines` are preprocessor names such as RORQUAL_GUEST_INIT.

    Raises: SandboxError when there is no compiler or it fails.
    """
    cc = compiler()
    if cc is None:
        raise SandboxError(
            "the sandbox agent is not built yet and this machine has no C compiler (cc, gcc or clang, or $CC). "
            "Install one, e.g. `apt install gcc libc6-dev`."
        )
    return _built(tuple(cc), tuple(sorted(defines)))


@lru_cache
def _built(cc: tuple[str, ...], defines: tuple[str, ...]) -> Path:
    sources = sorted(FOLDER.glob("*.c"))
    flags = [*FLAGS, *(f"-D{name}" for name in defines)]
    version = subprocess.run([*cc, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(repr((cc, flags)).encode() + version)
    for path in [*sources, *sorted(FOLDER.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_folder() / "agent" / digest.hexdigest()[:24] / "agent"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "agent"
        command = [*cc, *flags, "-o", str(made), *map(str, sources)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SandboxError(
                f"building the sandbox agent failed: {result.stderr.strip()[-2000:]}\n  The command was: "
                f"{shlex.join(command)}\n  It needs a static C library (`apt install libc6-dev`)."
            )
        made.chmod(0o755)
        os.replace(made, target)
    return target


def digest_of(path: Path) -> str:
    """The build's hash, which also names it for caches of what depends on it."""
    return path.parent.name
