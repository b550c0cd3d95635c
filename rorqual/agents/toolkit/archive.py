"""Builds the zip that goes into a sandbox: `guest.py` as its main program, and pypdf, openpyxl and et_xmlfile.

One file needs one upload, works in every kind of sandbox, and python3 runs it as it is; it is named by its digest, so
the same one is never sent twice. The packages are those installed here (extra `agents`), in source form: the sandbox's
Python may be another version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rorqual.errors import MissingExtraError

PACKAGES = ("pypdf", "openpyxl", "et_xmlfile")
EPOCH = (1980, 1, 1, 0, 0, 0)
FOLDER = ".rorqual"
"""In the working folder, so that it is part of disk snapshots."""


@dataclass(frozen=True)
class Toolkit:
    """The zip's bytes, and where it lies inside."""

    data: bytes
    path: str


@cache
def build_toolkit() -> Toolkit:
    """The same bytes for the same packages, always. Raises: MissingExtraError when one is not installed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        _add(archive, "__main__.py", Path(__file__).with_name("guest.py").read_bytes())
        for package in PACKAGES:
            root = _folder_of(package)
            for path in sorted(root.rglob("*")):
                if path.is_file() and path.suffix in (".py", ".txt", ".json"):
                    _add(archive, f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes())
    data = buffer.getvalue()
    return Toolkit(data, f"{FOLDER}/tools-{hashlib.sha256(data).hexdigest()[:16]}.pyz")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingExtraError(
            f'the document tools need {package}, which is not installed. Install it with: pip install "rorqual[agents]"'
        )
    return Path(found.origin).parent
