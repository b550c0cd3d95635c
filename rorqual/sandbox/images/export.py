"""Images for others: a tar in OCI's layout that podman, skopeo and docker read.

The same image always gives the same bytes. Layers are packed with gzip; deletions take OCI's form again.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from rorqual.sandbox.images.intake import ARCHITECTURES
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.images.tree import Entry, Image

_TYPE = "application/vnd.oci.image."


def write_tar(image: Image, out: BinaryIO) -> None:
    """One layer as an uncompressed tar, deletions as `.wh.NAME`."""
    names: dict[int, str] = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for entry in image.entries():
            info = _header(entry)
            if entry.path and entry.links > 1 and not stat.S_ISDIR(entry.mode):
                first = names.setdefault(entry.number, info.name)
                if first != info.name:
                    info.type, info.linkname = tarfile.LNKTYPE, first
                    archive.addfile(info)
                    continue
            if stat.S_ISREG(entry.mode):
                info.size = entry.size
                archive.addfile(info, cast("Any", _Pieces(image.content(entry))))
                continue
            if stat.S_ISLNK(entry.mode):
                info.linkname = os.fsdecode(image.target(entry))
            if entry.path or not entry.is_opaque:
                archive.addfile(info)
            if entry.is_opaque:
                archive.addfile(tarfile.TarInfo(f"{info.name}/.wh..wh..opq".lstrip("/")))


def _header(entry: Entry) -> tarfile.TarInfo:
    path = entry.path
    if entry.is_whiteout:
        info = tarfile.TarInfo(os.fsdecode(b"/".join([*path[:-1], b".wh." + path[-1]])))
        info.mode = 0
        return info
    info = tarfile.TarInfo(os.fsdecode(b"/".join(path)) or ".")
    types = {stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFIFO: tarfile.FIFOTYPE}
    info.type = types.get(stat.S_IFMT(entry.mode), tarfile.REGTYPE)
    attributes = entry.attributes
    info.mode, info.uid, info.gid = attributes.mode, attributes.uid, attributes.gid
    info.mtime = attributes.mtime_ns // 10**9
    info.pax_headers = {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
        for name, value in attributes.xattrs.items()
        if name.startswith("user.") and ".overlay." not in name
    }
    return info


class _Pieces:
    """An iterator of bytes with a `read`, for tarfile."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, count: int) -> bytes:
        while len(self._rest) < count and (more := next(self._pieces, b"")):
            self._rest += more
        part, self._rest = self._rest[:count], self._rest[count:]
        return part


def export_image(store: Store, name: str, target: Path) -> int:
    """Write image `name` to a new file in OCI's layout, in one step; returns its size. Raises: SandboxError."""
    digests = store.resolve([name])
    reference = store.reference(name)
    config = json.loads(reference.note.get("config", "{}")) if reference else {}
    architecture = ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rorqual-export-", dir=target.parent) as folder:
        whole = Path(folder) / "image.tar"
        with tarfile.open(whole, "w", format=tarfile.PAX_FORMAT) as archive:
            described, plain = [], []
            for digest in digests:
                packed = Path(folder) / "layer"
                inside, media_type = _pack(store.tree(digest), packed)
                plain.append(f"sha256:{inside}")
                described.append(_put_file(archive, packed, media_type))
            image = {"architecture": architecture, "os": "linux", "config": config}
            image["rootfs"] = {"type": "layers", "diff_ids": plain}
            manifest = {"schemaVersion": 2, "mediaType": _TYPE + "manifest.v1+json", "layers": described}
            manifest["config"] = _put(archive, _text(image), _TYPE + "config.v1+json")
            entry = _put(archive, _text(manifest), _TYPE + "manifest.v1+json")
            entry["platform"] = {"architecture": architecture, "os": "linux"}
            entry["annotations"] = {"org.opencontainers.image.ref.name": name}
            _add(archive, "index.json", _text({"schemaVersion": 2, "manifests": [entry]}))
            _add(archive, "oci-layout", _text({"imageLayoutVersion": "1.0.0"}))
        os.replace(whole, target)
    return target.stat().st_size


def _pack(image: Image, target: Path) -> tuple[str, str]:
    """A layer as tar.gz; returns the SHA-256 of the tar inside, and the layer's media type.

    One that shrinks so much that it looks like an archive bomb (here too, when it comes back) is left unpacked.
    """
    with open(target, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
        counting = _Hashing(out)
        write_tar(image, cast("BinaryIO", counting))
    if counting.size < 50 * target.stat().st_size:
        return counting.digest.hexdigest(), _TYPE + "layer.v1.tar+gzip"
    with open(target, "wb") as raw:
        write_tar(image, raw)
    return counting.digest.hexdigest(), _TYPE + "layer.v1.tar"


class _Hashing:
    """Passes on what is written and keeps its SHA-256 and size."""

    def __init__(self, out: gzip.GzipFile) -> None:
        self._out, self.digest, self.size = out, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self._out.write(data)


def _put_file(archive: tarfile.TarFile, path: Path, media_type: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        info = tarfile.TarInfo(f"blobs/sha256/{digest}")
        info.size = path.stat().st_size
        if info.name not in archive.getnames():
            archive.addfile(info, file)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": info.size}


def _put(archive: tarfile.TarFile, data: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    _add(archive, f"blobs/sha256/{digest}", data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
