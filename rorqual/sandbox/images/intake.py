"""Layers from other people's archives: a tar of a root file system, or an image in OCI's layout.

Nothing is unpacked with our rights: an archive is read under limits and its files go straight into a layer, with the
owners it names. Deletions in OCI's form (`.wh.NAME`, `.wh..wh..opq`) become overlayfs's. Devices and sockets are left
out (a sandbox gets its own /dev), and so are set-id bits, which do nothing in one. Blobs are checked by their digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import PolicyRejected
from rorqual.sandbox.images.archive import extract
from rorqual.sandbox.images.beneath import shown
from rorqual.sandbox.images.erofs import Attributes, Writer
from rorqual.sandbox.images.store import Reference, Store
from rorqual.sandbox.images.tar import HARD_LINK, ArchiveLimits, Member, Reader

IMAGE_LIMITS = ArchiveLimits(entries=1_000_000, total_bytes=64 << 30, entry_bytes=16 << 30, depth=128, seconds=3600.0)
"""A root file system is larger than what goes into a running sandbox; the ratio is the same."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_WHITEOUT, _OPAQUE = b".wh.", b".wh..wh..opq"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def add_tar(writer: Writer, file: BinaryIO, limits: ArchiveLimits = IMAGE_LIMITS) -> int:
    """Add the files of a tar archive to a layer; returns how many entries it had. Raises: PolicyRejected."""
    reader = Reader(file, limits)
    for member, content in reader:
        name = member.path[-1] if member.path else b""
        if name == _OPAQUE:
            writer.opaque(member.path[:-1])
        elif name.startswith(_WHITEOUT):
            writer.special((*member.path[:-1], name[len(_WHITEOUT) :]), Attributes(0), stat.S_IFCHR)
        else:
            _add(writer, member, content)
    return reader.entries


def _add(writer: Writer, member: Member, content: Iterator[bytes]) -> None:
    xattrs = {
        name: value for name, value in member.xattrs.items() if name.startswith("user.") and ".overlay." not in name
    }
    mode = member.mode if member.kind == stat.S_IFDIR else member.mode & ~(stat.S_ISUID | stat.S_ISGID)
    attributes = Attributes(mode, _id(member, member.uid), _id(member, member.gid), member.mtime_ns, xattrs)
    if member.kind == stat.S_IFDIR:
        writer.folder(member.path, attributes)
    elif member.kind == stat.S_IFREG:
        writer.regular(member.path, attributes, content)
    elif member.kind == stat.S_IFLNK:
        writer.symlink(member.path, attributes, member.target)
    elif member.kind == HARD_LINK:
        writer.link(member.path, tuple(part for part in member.target.split(b"/") if part not in (b"", b".")))
    elif member.kind == stat.S_IFIFO:
        writer.special(member.path, attributes, stat.S_IFIFO)


def _id(member: Member, number: int) -> int:
    if number >= 65536:
        raise PolicyRejected(
            f"{shown(member.path)} belongs to id {number}; a sandbox has the ids 0 to 65535. Change its owner."
        )
    return number


def import_image(store: Store, source: Path, name: str) -> Reference:
    """Take in a folder or tar in OCI's layout, or a plain tar of files (also packed), as image `name`.

    Raises: SandboxError when it is neither, a digest does not fit, or the image is for another processor.
    """
    if source.is_dir():
        return _import_layout(store, source, name)
    try:
        with open(source, "rb") as file:
            kind = _kind_of(file)
            if kind == "tar":
                digest = store.add(lambda writer: _whole(writer, file), kind="base", note={"from": source.name})
                return store.name(name, [digest], note={"from": source.name})
            with tempfile.TemporaryDirectory(prefix="rorqual-intake-") as folder:
                extract(file, Path(folder), IMAGE_LIMITS, quarantine=True)
                return _import_layout(store, Path(folder), name)
    except OSError as error:
        raise SandboxError(
            f"{source} could not be read: {error.strerror}. Name a tar archive or an OCI folder."
        ) from error


def _whole(writer: Writer, file: BinaryIO) -> None:
    add_tar(writer, file)
    writer.finish()


def _kind_of(file: BinaryIO) -> str:
    """Whether a tar holds a layout or the files themselves, by its first entries; rewinds."""
    kind = "tar"
    for count, (member, _) in enumerate(Reader(file, IMAGE_LIMITS)):
        if member.path in ((b"oci-layout",), (b"index.json",)) or member.path[:2] == (b"blobs", b"sha256"):
            kind = "layout"
        if kind == "layout" or count >= 20:
            break
    file.seek(0)
    return kind


def _import_layout(store: Store, folder: Path, name: str) -> Reference:
    manifest = _manifest(folder, _json(folder / "index.json"))
    config = _json_blob(folder, manifest["config"])
    layers: list[str] = []
    for described in manifest["layers"]:
        with _blob(folder, described) as file:

            def build(writer: Writer, file: BinaryIO = file) -> None:
                add_tar(writer, file)
                writer.finish()

            layers.append(store.add(build, kind="diff" if layers else "base", note={"from": described["digest"]}))
    note = {"from": "oci", "config": json.dumps(config.get("config") or {}, sort_keys=True)}
    return store.name(name, list(dict.fromkeys(layers)), note=note)


def _manifest(folder: Path, index: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """The manifest for this machine's processor, through nested indexes."""
    wanted = ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    described = index.get("manifests")
    if not isinstance(described, list) or not described or depth > 3:
        raise SandboxError(f"{folder} has no index.json that lists an image. Give a folder or tar in OCI's layout.")
    fitting = [one for one in described if (one.get("platform") or {}).get("architecture", wanted) == wanted]
    if not fitting:
        there = ", ".join(sorted({one["platform"]["architecture"] for one in described}))
        raise SandboxError(f"the image is for {there}, and this machine is {wanted}. Get the variant for {wanted}.")
    found = _json_blob(folder, fitting[0])
    return _manifest(folder, found, depth + 1) if "manifests" in found else found


def _blob(folder: Path, described: dict[str, Any]) -> BinaryIO:
    """An open blob whose bytes were compared with its digest. Raises: SandboxError when they differ."""
    match = _DIGEST.fullmatch(str(described.get("digest")))
    if not match:
        raise SandboxError(f"the image names a blob {described.get('digest')!r}; only sha256 digests are known here.")
    try:
        file = open(folder / "blobs" / "sha256" / match[1], "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise SandboxError(f"blob {match[1][:12]} of the image is missing: {error.strerror}. Get it again.") from error
    if hashlib.file_digest(file, "sha256").hexdigest() != match[1]:
        file.close()
        raise SandboxError(
            f"blob {match[1][:12]} of the image is damaged: its content has another digest. Get it again."
        )
    file.seek(0)
    return file


def _json_blob(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    with _blob(folder, described) as file:
        return _object(file.read(8 << 20), f"blob {described['digest']}")


def _json(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_bytes(), path.name)
    except OSError as error:
        raise SandboxError(f"{path} cannot be read: {error.strerror}. Give a folder or tar in OCI's layout.") from error


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SandboxError(f"{what} of the image is no JSON: {error}. Get the image again.") from error
    if not isinstance(found, dict):
        raise SandboxError(f"{what} of the image is no JSON object. Get the image again.")
    return found
