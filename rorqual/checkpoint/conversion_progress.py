"""How a conversion goes on after it was interrupted or killed: which files are finished, and whose folder it is."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rorqual.checkpoint.conversion_plan import PlannedFile
from rorqual.checkpoint.pieces import Source
from rorqual.checkpoint.piecewise import held, sha256_of
from rorqual.checkpoint.safetensors_io import TEMPORARY, model_files, write_text
from rorqual.checkpoint.store import COMPANIONS
from rorqual.errors import CheckpointError

PROGRESS = "convert-progress.json"
OnBytes = Callable[[str, int, int], None]
"""Told what is being done ("check", "write", "verify"), the bytes done and the bytes there are."""


class Progress:
    """The finished files of a conversion, by name with their SHA-256; on the disk after each."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder / PROGRESS
        self.about = about
        self.digests: dict[str, str] = {}

    def kept(self, files: list[PlannedFile], on_bytes: OnBytes) -> set[str]:
        """Files of an earlier run that are still what they were; the others are forgotten and written again."""
        found = self._read()
        total = sum(file.nbytes for file in files if file.name in found)
        done = 0
        for file in files:
            path = self.path.with_name(file.name)
            if file.name not in found or not path.is_file() or path.stat().st_size != file.nbytes:
                continue
            if sha256_of(path) == found[file.name]:
                self.digests[file.name] = found[file.name]
            done += file.nbytes
            on_bytes("check", done, total)
        self._save()
        return set(self.digests)

    def finished(self, name: str, digest: str) -> None:
        self.digests[name] = digest
        self._save()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            about, files = document["about"], dict(document["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({error}), so it is unknown what is finished. Delete the folder and start "
                "again."
            ) from error
        if about != self.about:
            raise CheckpointError(
                f"{self.path.parent} holds an unfinished conversion of another source or with other options. Run that "
                "one to its end, delete the folder, or name another."
            )
        return files

    def _save(self) -> None:
        write_text(self.path, json.dumps({"about": self.about, "files": self.digests}, indent=2) + "\n")


@contextlib.contextmanager
def opened(target: Path, about: dict[str, Any]) -> Iterator[Progress]:
    """The target folder, made if need be and held against a second conversion; what a killed one left is removed.

    Raises: CheckpointError when it holds another checkpoint, or another process is writing to it.
    """
    with held(target, "converting"):
        if not (target / PROGRESS).exists():
            there = [path.name for path in model_files(target)]
            there += [name for name in ("config.json", *COMPANIONS) if (target / name).exists()]
            if there:
                raise CheckpointError(
                    f"{target} already holds {', '.join(there[:3])}, which would be overwritten. Name an empty folder, "
                    "or delete this one first."
                )
        for left in target.glob(TEMPORARY):
            left.unlink(missing_ok=True)
        yield Progress(target, about)


def fingerprint(weights: Source) -> dict[str, Any]:
    """What tells one source from another: its files with size and time of change, and its config."""
    paths = sorted({info.path for info in weights.files.tensors.values()})
    config = (weights.folder / "config.json").read_bytes()
    return {
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "config": hashlib.sha256(config).hexdigest(),
    }


def check_space(target: Path, files: list[PlannedFile]) -> None:
    """Raises: CheckpointError when those files do not fit on the target's disk."""
    check_free(target, sum(file.nbytes for file in files))


def check_free(target: Path, needed: int) -> None:
    """Raises: CheckpointError when so many bytes do not fit on the target's disk."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed:,} bytes more, but its disk has {free:,} free, {needed - free:,} too few. Nothing "
            "was written. Free some space or name a folder on another disk."
        )
