"""The folders in which this user's sandboxes lie: the data folder, and every other that sandboxes were ever made in.

    <data>/bases/<name>.json    {"folder": ..., "machine": ...}, written before the first sandbox is made in that folder

An edge of a cluster, or a caller with `home=`, keeps its sandboxes elsewhere, and they stand on the layers of the data
folder all the same. Lists, sweeps and collectors therefore look through all of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.folders import data_folder


def register(base: Path | str, home: Path | None = None) -> None:
    """Make a folder known in the data folder `home` (the user's own by default); cheap when it is known already."""
    top, folder = home or data_folder(), Path(base).absolute()
    note = _note(folder, top)
    if folder == top.absolute() or note.exists():
        return
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = note.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}")
    with open(scratch, "x") as file:
        json.dump({"folder": str(folder), "machine": platform.node()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, note)


def forget(base: Path | str, home: Path | None = None) -> None:
    """No sandboxes are made there any more; fine when it was not known."""
    _note(Path(base).absolute(), home or data_folder()).unlink(missing_ok=True)


def forget_missing(home: Path | None = None) -> None:
    """Drop what is known of folders of this machine that are no more."""
    for note in _notes(home or data_folder()):
        try:
            told = json.loads(note.read_text())
            if told["machine"] == platform.node() and not Path(told["folder"]).exists():
                note.unlink(missing_ok=True)
        except (OSError, ValueError, KeyError):
            continue


def known(home: Path | None = None, *, strict: bool = False) -> list[Path]:
    """The data folder itself, then every other that is there.

    strict: for who removes what no sandbox needs: one that cannot be looked into is then an error.
    Raises: SandboxError (only if strict) naming the note of a folder that cannot be seen from here.
    """
    top = home or data_folder()
    found = [top, *(path.parent for path in sorted(top.glob("edges/*/sandboxes")))]
    for note in _notes(top):
        try:
            told = json.loads(note.read_text())
            folder, machine = Path(told["folder"]), told["machine"]
        except FileNotFoundError:
            continue  # it just went
        except (OSError, ValueError, KeyError, TypeError) as error:
            if strict:
                raise SandboxError(
                    f"{note} cannot be read: {error}. It names a folder with sandboxes, which may need what would be "
                    "removed. Delete it if no sandboxes are kept outside of the data folder."
                ) from error
            continue
        if folder.is_dir():
            found.append(folder)
        elif strict and machine != platform.node():
            raise SandboxError(
                f"{folder} on machine {machine} has sandboxes that may need what would be removed, and it cannot be "
                f"looked into here. Collect there, or delete {note} if those sandboxes are over."
            )
    return list(dict.fromkeys(found))


def _notes(top: Path) -> list[Path]:
    return sorted((top / "bases").glob("*.json"))


def _note(folder: Path, top: Path) -> Path:
    """Named by folder and machine, since several machines may share a data folder."""
    name = hashlib.sha256(os.fsencode(f"{platform.node()}:{folder}")).hexdigest()[:24]
    return top / "bases" / f"{name}.json"
