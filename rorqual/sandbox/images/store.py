"""The layer store: layers named by their content, and names for stacks of them.

    objects/ab/<digest>         one EROFS image
    objects/ab/<digest>.json    its manifest: size and chunk digests; a layer is there once this is
    names/<name>.json           an image or snapshot: its layers from the bottom up, and what it is
    logs/*.json                 rollout logs whose snapshots are kept
    tmp/                        being written; left only by a process that was killed

Any folder will do, also one that several machines share; everything is written under another name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import SandboxError
from rorqual.folders import data_folder
from rorqual.sandbox.errors import SnapshotFailed
from rorqual.sandbox.images import pack
from rorqual.sandbox.images.erofs import Writer
from rorqual.sandbox.images.local import Local
from rorqual.sandbox.images.objects import FolderObjects, Layer, VerifiedReader, chunks_of
from rorqual.sandbox.images.stack import add_merged
from rorqual.sandbox.images.tree import Image

LayerKind = Literal["base", "workspace", "toolkit", "diff"]
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Reference:
    """A name for a stack of layers, from the bottom up.

    kind: "image" (made by people) or "snapshot" (of sandbox `owner`); keep: not collected when its owner is gone.
    """

    name: str
    layers: tuple[str, ...]
    kind: Literal["image", "snapshot"] = "image"
    created: float = 0.0
    owner: str | None = None
    keep: bool = True
    note: dict[str, str] = field(default_factory=dict)


class Store:
    """A folder of layers; the user's own `layers` when none is named. Made at first use.

    local: where this machine mounts or unpacks them; mount=False unpacks even as root.
    """

    def __init__(self, folder: Path | None = None, local: Path | None = None, *, mount: bool = True) -> None:
        self.folder = folder if folder is not None else data_folder() / "layers"
        here = hashlib.sha256(os.fsencode(self.folder.absolute())).hexdigest()[:12]
        self.local = Local(local if local is not None else data_folder() / "mounted" / here, mount)
        self.objects = FolderObjects(self.folder)

    # --- layers

    def add(self, build: pack.Build, *, kind: LayerKind = "diff", note: Mapping[str, str] | None = None) -> str:
        """Store what `build` writes as a layer, durably; returns its digest. The same files give the same one."""
        with self.objects.temporary() as file:
            build(Writer(file))
            size, chunks = chunks_of(file)
            layer = Layer.made(size, chunks, kind, time.time(), dict(note or {}))
            with self.objects.locked(alone=False):
                if not self._has(layer):
                    self.objects.publish(file, _key(layer.digest))
                    self.objects.put(_manifest(layer.digest), io.BytesIO(json.dumps(asdict(layer)).encode()))
        return layer.digest

    def pack(
        self,
        upper: Path,
        *,
        owners: pack.Owners | None = None,
        scrub: Sequence[str] = (),
        kind: LayerKind = "diff",
        note: Mapping[str, str] | None = None,
    ) -> str:
        """A folder as a layer: a disk snapshot of a sandbox that stands still, deletions kept. Returns its digest.

        owners: how host ids are read (see `pack.Owners`); scrub: patterns to leave out, such as `pack.SCRUB`; the
        folder itself is not changed. It is stored, synced and read back before this returns.
        Raises: SnapshotFailed; nothing is stored then.
        """

        def build(writer: Writer) -> None:
            pack.add_folder(writer, upper, owners=owners, scrub=scrub)
            writer.finish()

        try:
            digest = self.add(build, kind=kind, note=note)
            self.object_path(digest)
            return digest
        except OSError as error:
            raise SnapshotFailed(f"{upper} could not be stored in {self.folder}: {error}. Nothing was kept.") from error

    def layer(self, digest: str) -> Layer:
        """A layer's manifest. Raises: SandboxError when it is not there or does not belong to its name."""
        try:
            if not _DIGEST.fullmatch(digest):
                raise FileNotFoundError
            key = _manifest(digest)
            data: dict[str, Any] = json.loads(self.objects.get_range(key, 0, self.objects.stat(key) or 0))
            layer = Layer(**{**data, "chunks": tuple(data["chunks"])})
            if layer.digest != digest:
                raise ValueError(f"it is that of layer {layer.digest[:12]}")
            return layer
        except FileNotFoundError:
            raise SandboxError(
                f"there is no layer {digest[:64]!r} in {self.folder}; `rorqual sandbox image list` shows what is."
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise SandboxError(
                f"the manifest of layer {digest[:12]} in {self.folder} cannot be read: {error}. Restore it from a "
                "copy, or remove the layer and make it again."
            ) from error

    def reader(self, digest: str) -> VerifiedReader:
        """Bytes of a layer, each chunk verified at its first read and counted in `objects.counters`."""
        return VerifiedReader(self.objects, _key(digest), self.layer(digest))

    def tree(self, digest: str) -> Image:
        """The files of a layer, read without mounting, only as far as one looks."""
        layer = self.layer(digest)
        return Image(VerifiedReader(self.objects, _key(digest), layer), layer.size)

    def object_path(self, digest: str) -> Path:
        """The layer's EROFS image as a file, verified whole on this machine: a read-only disk for a virtual machine."""
        file = self.objects.path(_key(digest))
        try:
            before = self.local.identify(file)
        except FileNotFoundError:
            self.layer(digest)  # says so if there is no such layer
            raise SandboxError(
                f"layer {digest[:12]} has a manifest but no content in {self.folder}. Remove it."
            ) from None
        if not self.local.is_verified(digest, file):
            self.reader(digest).verify()
            self.local.mark_verified(digest, before)
        return file

    def lowerdirs(self, names: Sequence[str]) -> list[Path]:
        """Read-only folders for overlayfs, the topmost first as `lowerdir=` wants them.

        names: images, snapshots or layers, from the bottom up. The folders stay until `release` or this process ends,
        and under an overlay mounted meanwhile for as long as its sandbox's folder says that it uses them (`collect`).
        """
        return [self.local.provide(digest, self.object_path(digest)) for digest in reversed(self.resolve(names))]

    def release(self) -> None:
        """Let go of the folders that `lowerdirs` gave, once the overlay is mounted."""
        self.local.release()

    def layers(self) -> Iterator[Layer]:
        """Every layer whose manifest can be read."""
        for key in self.objects.keys("objects/"):
            if key.endswith(".json"):
                with suppress(SandboxError):
                    yield self.layer(key.rpartition("/")[2].removesuffix(".json"))

    def delete(self, digest: str) -> None:
        """Remove a layer, whatever names it; `collect` asks first."""
        self.objects.delete(_manifest(digest))
        self.objects.delete(_key(digest))

    def collectable(self, needed: Set[str], before: float) -> Iterator[str]:
        """Layers (also such without a manifest, which a killed writer left) not in `needed` and older than `before`."""
        for key in self.objects.keys("objects/"):
            digest = key.rpartition("/")[2].removesuffix(".json")
            whole = self.objects.stat(_manifest(digest)) is not None
            if digest not in needed and key.endswith(".json") == whole and self._time_of(digest) < before:
                yield digest

    def remove_if_old(self, digest: str, before: float) -> int:
        """Delete a layer unless somebody stored it again meanwhile; returns the bytes freed."""
        with self.objects.locked(alone=True):
            if self._time_of(digest) >= before:
                return 0
            size = self.size_of(digest)
            self.delete(digest)
            return size

    def size_of(self, digest: str) -> int:
        """Bytes a layer takes."""
        return self.objects.stat(_key(digest)) or 0

    def _time_of(self, digest: str) -> float:
        """When a layer was last stored, in seconds since 1970."""
        times = [0.0]
        for key in (_manifest(digest), _key(digest)):
            with suppress(FileNotFoundError):
                times.append(self.objects.path(key).stat().st_mtime)
        return max(times)

    # --- names

    def name(
        self,
        name: str,
        layers: Sequence[str],
        *,
        kind: Literal["image", "snapshot"] = "image",
        owner: str | None = None,
        keep: bool = True,
        note: Mapping[str, str] | None = None,
    ) -> Reference:
        """Give a stack of layers (from the bottom up) a name, in place of what had it. Raises: SandboxError."""
        if not _NAME.fullmatch(name) or _DIGEST.fullmatch(name):
            raise SandboxError(f"{name!r} cannot name an image: letters, digits, and . _ - after the first, no digest.")
        for digest in layers:
            self.layer(digest)
        reference = Reference(name, tuple(layers), kind, time.time(), owner, keep, dict(note or {}))
        self.objects.put(f"names/{name}.json", io.BytesIO(json.dumps(asdict(reference)).encode()))
        return reference

    def reference(self, name: str) -> Reference | None:
        """What a name stands for, or None."""
        if not _NAME.fullmatch(name):
            return None
        try:
            data = json.loads((self.folder / "names" / f"{name}.json").read_text())
            return Reference(**{**data, "layers": tuple(data["layers"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise SandboxError(
                f"the name {name!r} in {self.folder} cannot be read: {error}. "
                "Remove it with `rorqual sandbox image remove`."
            ) from error

    def references(self) -> list[Reference]:
        """Every name, in order; one that cannot be read is an error, for its layers are not known."""
        names = sorted(key[6:-5] for key in self.objects.keys("names/") if key.endswith(".json"))
        return [found for name in names if (found := self.reference(name))]

    def forget(self, name: str) -> None:
        """Remove a name; its layers stay until they are collected. Raises: SandboxError when there is none."""
        if not _NAME.fullmatch(name) or self.objects.stat(f"names/{name}.json") is None:
            raise SandboxError(f"there is no image {name!r} in {self.folder}; `rorqual sandbox image list` shows them.")
        self.objects.delete(f"names/{name}.json")

    def protect(self, journal: Path) -> None:
        """Let snapshots named in a rollout log be as long as a request in it is open, wherever the log lies.

        Those of `rorqual agent` are found without. A log that is deleted protects nothing any more.
        """
        note = json.dumps({"path": str(journal.absolute()), "machine": platform.node()}).encode()
        self.objects.put(f"logs/{hashlib.sha256(note).hexdigest()[:24]}.json", io.BytesIO(note))

    def protected(self) -> list[Path]:
        """The rollout logs of `protect` that are still there. Raises: SandboxError for one of another machine."""
        found = []
        for key in self.objects.keys("logs/"):
            note = json.loads((self.folder / key).read_text())
            path = Path(note["path"])
            if path.is_dir():
                found.append(path)
            elif note["machine"] != platform.node():
                raise SandboxError(
                    f"{path} on machine {note['machine']} is a rollout log that may need layers of {self.folder}, "
                    f"and it cannot be read here. Collect there, or delete {self.folder / key} if that log is over."
                )
        return found

    def collapsed(self, layers: Sequence[str], most: int = 20) -> list[str]:
        """A stack as it is, or with its upper layers merged into one where there are more than `most`.

        What stands below the diffs (base, workspace, toolkit) stays, since others share it.
        """
        if len(layers) <= most:
            return list(layers)
        shared = next((n for n, digest in enumerate(layers) if self.layer(digest).kind == "diff"), len(layers) - 1)
        images = [self.tree(digest) for digest in layers[shared:]]

        def build(writer: Writer) -> None:
            add_merged(writer, images)
            writer.finish()

        return [*layers[:shared], self.add(build, note={"merged": str(len(images))})]

    def resolve(self, names: Sequence[str]) -> list[str]:
        """Layers from the bottom up, of images, snapshots and layers (whole digests) stacked in this order."""
        digests: list[str] = []
        for name in names:
            found = self.reference(name)
            if found is None and not _DIGEST.fullmatch(name):
                known = ", ".join(reference.name for reference in self.references()) or "none yet"
                raise SandboxError(
                    f"there is no image {name!r} in {self.folder} (there are: {known}). "
                    f"Make one with `rorqual sandbox image build {name}`."
                )
            digests.extend(found.layers if found else [name])
        return list(dict.fromkeys(digests))

    def _has(self, layer: Layer) -> bool:
        """Whether it is there whole; if so its manifest gets a new time, which keeps a collector away."""
        if self.objects.stat(_key(layer.digest)) != layer.size:
            return False
        try:
            os.utime(self.objects.path(_manifest(layer.digest)))
            return True
        except FileNotFoundError:
            return False


def _key(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def _manifest(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}.json"
