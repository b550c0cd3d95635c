"""Builds a root file system from Debian or Ubuntu packages and stores it as layers.

mmdebstrap does it for ordinary users too (with newuidmap and a range in /etc/subuid, or fakechroot); debootstrap only
as root. Packages come from the network, signed by the distribution; the stream goes straight into a layer. Fixed times
and no logs, caches or documentation, so that the same packages give the same layer.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from rorqual.errors import SandboxError
from rorqual.sandbox.images import pack
from rorqual.sandbox.images.erofs import Writer
from rorqual.sandbox.images.intake import add_tar
from rorqual.sandbox.images.stack import add_difference
from rorqual.sandbox.images.store import Reference, Store
from rorqual.sandbox.images.tree import Image, image_of

BASE = ("bash", "coreutils", "grep", "sed", "findutils", "tar", "gzip", "python3-minimal", "ca-certificates")
OFFICE = ("python3", "python3-pypdf", "python3-openpyxl", "poppler-utils")
TOOLKITS = {"office": OFFICE}
"""Package sets for a layer of their own over the base, by name: office has what reads PDFs and spreadsheets."""
_OLD_PYPDF = ("bullseye", "focal", "jammy")
_EPOCH = "1672531200"  # the latest time any file of a built layer bears: 1 January 2023
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")
_HOOK = """set -e
printf 'agent:x:1000:1000:agent:/home/agent:/bin/bash\\n' >> "$1/etc/passwd"
printf 'agent:x:1000:\\n' >> "$1/etc/group"
mkdir -p "$1/home/agent"
chown 1000:1000 "$1/home/agent"
find "$1/var/log" "$1/var/cache/ldconfig" -type f -delete
rm -f "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old
rm -f "$1/etc/resolv.conf" "$1/etc/hostname" "$1/etc/passwd-" "$1/etc/group-" "$1/etc/shadow-" "$1/etc/gshadow-"
: > "$1/etc/machine-id"
"""
Progress = Callable[[str], None]


def build_base(
    store: Store,
    name: str,
    suite: str | None = None,
    packages: Sequence[str] = BASE,
    *,
    toolkits: Sequence[str] = (),
    mirror: str | None = None,
    progress: Progress = lambda line: None,
) -> Reference:
    """Build image `name`: a layer of `packages` and one for each toolkit, each over those before it.

    suite: a Debian or Ubuntu release by code name, this machine's own when none is named; mirror: where its packages
    are; progress: gets each line that the builder says. Raises: SandboxError with its last words when it fails.
    """
    suite = suite or own_suite()
    unknown = [toolkit for toolkit in toolkits if toolkit not in TOOLKITS]
    if unknown:
        raise SandboxError(f"there is no toolkit {unknown[0]!r}; there are: {', '.join(TOOLKITS)}.")
    wanted = [*packages]
    first = partial(_build, suite=suite, packages=wanted, mirror=mirror, progress=progress)
    layers = [store.add(first, kind="base", note=_note(suite, wanted))]
    for toolkit in toolkits:
        wanted = list(dict.fromkeys([*wanted, *_packages(toolkit, suite)]))
        with store.objects.temporary() as file:  # the whole tree, of which only what is new is kept
            _build(Writer(file), suite, wanted, mirror, progress)
            whole = image_of(file)
            lower = [store.tree(digest) for digest in layers]

            def build(writer: Writer, lower: list[Image] = lower, whole: Image = whole) -> None:
                add_difference(writer, lower, whole)
                writer.finish()

            layers.append(store.add(build, kind="toolkit", note=_note(suite, TOOLKITS[toolkit])))
    return store.name(name, layers, note={"suite": suite, "packages": " ".join(wanted)})


def own_suite() -> str:
    """Code name of this machine's release where it is Debian or Ubuntu, else Debian 12's."""
    told: dict[str, str] = {}
    try:
        for line in Path("/etc/os-release").read_text().splitlines():
            key, _, value = line.partition("=")
            told[key] = value.strip('"')
    except OSError:
        pass
    return told.get("VERSION_CODENAME", "bookworm") if told.get("ID") in ("debian", "ubuntu") else "bookworm"


def missing() -> str | None:
    """What lacks here to build, with what would bring it, or None."""
    if shutil.which("mmdebstrap"):
        return None if _mode() else _HOW_UNPRIVILEGED
    if os.geteuid() == 0 and shutil.which("debootstrap"):
        return None
    return "mmdebstrap is not installed (apt install mmdebstrap uidmap); an OCI image or a tar can be imported instead"


_HOW_UNPRIVILEGED = (
    "an ordinary user needs newuidmap (apt install uidmap) and 65,536 ids in /etc/subuid and /etc/subgid "
    "(an administrator runs: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER), or fakechroot and "
    "fakeroot"
)


def _mode() -> str | None:
    """How mmdebstrap can work for this user."""
    if os.geteuid() == 0:
        return "root"
    user = pwd.getpwuid(os.geteuid()).pw_name
    try:
        ranges = all(
            any(line.split(":")[0] in (user, str(os.geteuid())) for line in Path(file).read_text().splitlines())
            for file in ("/etc/subuid", "/etc/subgid")
        )
    except OSError:
        ranges = False
    if ranges and shutil.which("newuidmap"):
        return "unshare"
    return "fakechroot" if shutil.which("fakechroot") and shutil.which("fakeroot") else None


def _packages(toolkit: str, suite: str) -> list[str]:
    return [
        "python3-pypdf2" if package == "python3-pypdf" and suite in _OLD_PYPDF else package
        for package in TOOLKITS[toolkit]
    ]


def _note(suite: str, packages: Sequence[str]) -> dict[str, str]:
    return {"suite": suite, "packages": " ".join(packages)}


def _build(writer: Writer, suite: str, packages: Sequence[str], mirror: str | None, progress: Progress) -> None:
    """One root file system into a layer."""
    lacking = missing()
    if lacking:
        raise SandboxError(f"no image can be built here: {lacking}.")
    progress(f"building {suite} with {', '.join(packages)}")
    if shutil.which("mmdebstrap"):
        with tempfile.TemporaryDirectory(prefix="rorqual-build-") as folder:
            hook = Path(folder) / "hook.sh"
            hook.write_text("#!/bin/sh\n" + _HOOK)
            hook.chmod(0o755)
            Path(folder).chmod(0o755)  # the hook is run by another user id
            _stream(writer, _mmdebstrap(suite, packages, mirror, hook), progress)
    else:
        _debootstrap(writer, suite, packages, mirror, progress)
    writer.finish()


def _mmdebstrap(suite: str, packages: Sequence[str], mirror: str | None, hook: Path) -> list[str]:
    command = ["mmdebstrap", f"--mode={_mode()}", "--variant=apt", f"--include={','.join(packages)}", "--format=tar"]
    command += ['--aptopt=APT::Install-Recommends "false"', *_proxies(), f"--customize-hook={hook}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    return [*command, suite, "-", *([mirror] if mirror else [])]


def _proxies() -> list[str]:
    """This machine's own proxies for apt, which mmdebstrap does not look for."""
    try:
        told = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return [f"--aptopt={line.rstrip(';')}" for line in told.splitlines() if "::Proxy" in line and '""' not in line]


def _stream(writer: Writer, command: list[str], progress: Progress) -> None:
    """Run the builder and add the tar that it writes."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": _EPOCH, "LC_ALL": "C.UTF-8"}
    last: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    told = threading.Thread(target=_follow, args=(cast("BinaryIO", process.stderr), last, progress), daemon=True)
    told.start()
    try:
        add_tar(writer, cast("BinaryIO", process.stdout))
    except SandboxError as error:
        process.terminate()
        if process.wait() in (0, -15):
            raise SandboxError(f"what the builder wrote cannot be used: {error}") from error
    finally:
        cast("BinaryIO", process.stdout).close()
        code = process.wait()
        told.join(10)
    if code:
        raise _failed(command[0], code, last)


def _follow(stream: BinaryIO, last: deque[str], progress: Progress) -> None:
    for line in stream:
        text = line.decode("utf-8", "replace").rstrip()
        last.append(text)
        progress(text)


def _failed(program: str, code: int, last: deque[str]) -> SandboxError:
    words = "\n  ".join(line for line in last if line)
    offline = any(sign in words for sign in ("Could not resolve", "Failed to fetch", "Temporary failure", "Connection"))
    why = (
        "the packages could not be fetched: is the network there, or a --mirror that is nearer"
        if offline
        else "see above"
    )
    return SandboxError(
        f"{program} ended with {code}:\n  {words}\n  Nothing was stored; {why}. "
        "An OCI image or a tar can be imported without network: rorqual sandbox image import FILE NAME."
    )


def _debootstrap(writer: Writer, suite: str, packages: Sequence[str], mirror: str | None, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="rorqual-build-") as folder:
        root = Path(folder) / "root"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(root)]
        last: deque[str] = deque(maxlen=20)
        process = subprocess.Popen(
            [*command, *([mirror] if mirror else [])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        _follow(cast("BinaryIO", process.stdout), last, progress)
        code = process.wait() or subprocess.run(["sh", "-c", _HOOK, "hook", str(root)], check=False).returncode
        if code:
            raise _failed("debootstrap", code, last)
        scrub = (*_LEFT_OUT, "/var/cache/apt/archives/*.deb", "/var/lib/apt/lists/*", "/debootstrap")
        pack.add_folder(writer, root, scrub=scrub)
