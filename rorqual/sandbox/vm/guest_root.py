"""The root of a machine when no image is named: the essential programs of this host, packed once into a layer.

Taken are the files of the distribution's essential packages, of Python where it is installed as a package, and of
everything these depend on, as dpkg lists them; without documentation and translations. /etc is the minimal one of
`host_root`: nothing of the host's own /etc, /home, /root or /var is in it. It needs no network and no root.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox import host_root
from rorqual.sandbox.images.erofs import Attributes, Writer
from rorqual.sandbox.images.store import Store

STATUS = Path("/var/lib/dpkg/status")
LISTS = Path("/var/lib/dpkg/info")
ALSO = ("python3", "procps")
LEFT_OUT = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/share/info/", "/usr/share/lintian/")
TAKEN = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib32/", "/lib64/", "/libx32/")
VERSION = 1


def missing() -> str | None:
    """Why no root can be made here and what to do instead, or None."""
    if STATUS.exists() and LISTS.is_dir():
        return None
    return "this host has no dpkg to tell its essential files: name an image (`rorqual sandbox image build NAME`)"


def host_layer(store: Store) -> str:
    """The layer's digest; packed anew only when the installed packages changed. Raises: SandboxError."""
    if missing():
        raise SandboxError(f"a virtual machine needs a root file system, and {missing()}.")
    packages = _closure(_installed())
    state = hashlib.sha256(repr((VERSION, sorted(packages.items()), host_root._plan())).encode()).hexdigest()
    name = f"host-root-{state[:24]}"
    known = store.reference(name)
    if known is not None:
        return known.layers[0]

    def build(writer: Writer) -> None:
        _add_skeleton(writer)
        for path in sorted(_files(packages)):
            _add(writer, path)
        writer.finish()

    digest = store.add(build, kind="base", note={"from": "essential packages of this host"})
    store.name(name, [digest], note={"from": "essential packages of this host"})
    return digest


def _installed() -> dict[str, dict[str, str]]:
    """Installed packages by name, each with the fields that matter here."""
    found: dict[str, dict[str, str]] = {}
    wanted = ("Package", "Status", "Essential", "Depends", "Pre-Depends", "Provides", "Version", "Architecture")
    for paragraph in STATUS.read_text(errors="replace").split("\n\n"):
        fields = dict(re.findall(rf"^({'|'.join(wanted)}): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields
    return found


def _closure(installed: dict[str, dict[str, str]]) -> dict[str, str]:
    """Essential packages and what they need: name -> version."""
    provided: dict[str, str] = {}
    for name, fields in installed.items():
        for other in _names(fields.get("Provides", "")):
            provided.setdefault(other, name)
    todo = [name for name, fields in installed.items() if fields.get("Essential") == "yes"]
    todo += [name for name in ALSO if name in installed]
    taken: dict[str, str] = {}
    while todo:
        name = todo.pop()
        name = name if name in installed else provided.get(name, name)
        if name in taken or name not in installed:
            continue
        fields = installed[name]
        taken[name] = f"{fields.get('Version')}:{fields.get('Architecture')}"
        todo += _names(f"{fields.get('Depends', '')}, {fields.get('Pre-Depends', '')}")
    return taken


def _names(relation: str) -> list[str]:
    return [found for part in re.split(r"[,|]", relation) if (found := re.split(r"[ (:]", part.strip())[0])]


def _files(packages: dict[str, str]) -> Iterator[str]:
    """Paths of the packages' files as they lie on disk, through the links of a merged /usr."""
    for name, version in packages.items():
        architecture = version.rpartition(":")[2]
        for listing in (LISTS / f"{name}.list", LISTS / f"{name}:{architecture}.list"):
            with suppress(OSError):
                for line in listing.read_text(errors="surrogateescape").splitlines():
                    if line.startswith(TAKEN) and not line.startswith(LEFT_OUT):
                        yield from _with_compiled(line)


def _with_compiled(line: str) -> Iterator[str]:
    folder, name = os.path.realpath(os.path.dirname(line)), os.path.basename(line)
    yield os.path.join(folder, name)
    if name.endswith(".py"):  # compiling anew would take an emulated machine long, and each time
        cached = os.path.join(folder, "__pycache__")
        with suppress(OSError):
            found = [entry for entry in _listed(cached) if entry.startswith(name[:-2])]
            if found:
                yield cached
            yield from (os.path.join(cached, entry) for entry in found)


@lru_cache
def _listed(folder: str) -> list[str]:
    return os.listdir(folder)


def _add_skeleton(writer: Writer) -> None:
    writer.folder((), Attributes(0o755))
    for path, kind, content in host_root._plan():
        parts = tuple(os.fsencode(part) for part in path.split("/"))
        if kind == "folder":
            for depth in range(1, len(parts) + 1):
                writer.folder(parts[:depth], Attributes(0o755))
        elif kind == "link":
            writer.symlink(parts, Attributes(0o777), content)
        else:
            writer.regular(parts, Attributes(0o644), [content])


def _add(writer: Writer, path: str) -> None:
    """One file as it is on disk; what cannot be read (or went away) is left out, set-id bits are dropped."""
    try:
        status = os.lstat(path)
    except OSError:
        return
    parts = tuple(os.fsencode(part) for part in path.strip("/").split("/"))
    attributes = Attributes(stat.S_IMODE(status.st_mode) & 0o1777, mtime_ns=status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        writer.folder(parts, attributes)
    elif stat.S_ISLNK(status.st_mode):
        writer.symlink(parts, attributes, os.fsencode(os.readlink(path)))
    elif stat.S_ISREG(status.st_mode):
        with suppress(PermissionError):
            writer.regular(parts, attributes, [Path(path).read_bytes()])
