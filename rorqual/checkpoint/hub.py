"""Checkpoints from the Hugging Face Hub into a folder: resumable, every file checked against what the Hub says of it.

The Hub gives the SHA-256 of each large (LFS) file and the Git blob id, a SHA-1, of each small one. A file gets its name
only when its bytes have the right one; until then it is a hidden `.part`, which a later run goes on with. Weights come
before config.json and the index, so an unfinished folder is no checkpoint. Left out: the Hub's chunked Xet transfer;
files are fetched over plain HTTP, which it offers up to 50 GB a file.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rorqual.checkpoint.piecewise import held
from rorqual.checkpoint.safetensors_io import sync
from rorqual.errors import CheckpointError, MissingExtraError

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
"""`owner/name`, or `owner/name@revision`."""

HUB_FILES = ["*.json", "*.safetensors"]
"""What is fetched: weights, index, config and tokenizer."""

_TRIES = 5
"""Failures in a row, without a byte between them, after which a download gives up."""
_READ_BYTES = 1 << 20
_TIMEOUT_S = 30.0

OnBytes = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it: its size, and the SHA-256 of an LFS file or the Git blob id of another."""

    name: str
    nbytes: int
    sha256: str | None
    blob_id: str | None

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob_id or ""

    def hasher(self) -> Any:
        """What its digest is made with; a Git blob id covers the size too."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.nbytes}\0".encode(), usedforsecurity=False)


@dataclass
class Pulled:
    """What a pull did."""

    folder: Path
    repository: str
    commit: str
    """The revision's commit; all files are of that one."""
    nbytes: int = 0
    sha256: list[str] = field(default_factory=list)
    """Files whose SHA-256 is the Hub's."""
    blob_id: list[str] = field(default_factory=list)
    """Files whose Git blob id is the Hub's."""
    kept: list[str] = field(default_factory=list)
    """Of both, those that were there already."""
    replaced: list[str] = field(default_factory=list)
    """Files that were there with other bytes than the Hub's, and were fetched again."""


def import_hub(what: str) -> Any:
    """The Hub's client. Raises: MissingExtraError; `what` says what it was wanted for."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(
            f'{what}, but huggingface_hub is not installed. Install it with: pip install "rorqual[hub]", or correct '
            "the name."
        ) from error
    return huggingface_hub


def pull(
    repository: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    on_bytes: OnBytes | None = None,
    wait_s: float = 1.0,
) -> Pulled:
    """Fetch the checkpoint `owner/name` to `folder`; run it again to go on after an interruption.

    revision: branch, tag or commit. endpoint: of the Hub, otherwise as HF_ENDPOINT says. wait_s: before the first
    retry, doubled for each further one.
    Raises: CheckpointError when the repository cannot be read, the connection stays down, bytes do not have the Hub's
    digest after a second download, or the disk is full; MissingExtraError.
    """
    hub = import_hub(f"{repository!r} would come from the Hugging Face Hub")
    folder = Path(folder)
    commit, files = _list(hub, repository, revision, endpoint)
    result = Pulled(folder, repository, commit, nbytes=sum(file.nbytes for file in files))
    counter = _Counter(result.nbytes, on_bytes or (lambda _what, _done, _total: None))
    with held(folder, "fetching"):
        wanted = [file for file in files if not _is_there(file, result, counter)]
        _check_space(folder, wanted)
        for file in wanted:
            url = hub.hf_hub_url(repository, file.name, revision=commit, endpoint=endpoint)
            _fetch(hub, url, file, folder, counter, wait_s)
    for file in files:
        (result.blob_id if file.sha256 is None else result.sha256).append(file.name)
    return result


class _Counter:
    """Bytes that are there, for whoever watches."""

    def __init__(self, total: int, on_bytes: OnBytes) -> None:
        self.done, self._total, self._on_bytes = 0, total, on_bytes

    def add(self, count: int) -> None:
        self.done += count
        self._on_bytes("pull", self.done, self._total)


def _list(hub: Any, repository: str, revision: str | None, endpoint: str | None) -> tuple[str, list[HubFile]]:
    """The commit and its files, weights first."""
    at = "" if revision is None else f" at {revision}"
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the Hub client raises many kinds: network, HTTP, its own
        raise CheckpointError(
            f"the Hub does not show {repository}{at} ({type(error).__name__}: {_first_line(error)}), so nothing was "
            "fetched. Check the id, the revision, the network, and for a gated model HF_TOKEN."
        ) from error
    files = [
        HubFile(one.rfilename, one.size, None if one.lfs is None else one.lfs.sha256, one.blob_id)
        for one in info.siblings or []
        if "/" not in one.rfilename and any(fnmatch(one.rfilename, pattern) for pattern in HUB_FILES)
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{repository}{at} has no .safetensors files, so there is no checkpoint in it. Check the id and revision."
        )
    unknown = [file.name for file in files if not file.digest or file.nbytes is None]
    if unknown:
        raise CheckpointError(
            f"the Hub gives no size or digest for {', '.join(unknown[:3])} of {repository}, so what arrives could not "
            "be checked. Ask again later."
        )
    return info.sha, sorted(files, key=lambda file: (not file.name.endswith(".safetensors"), file.name))


def _fetch(hub: Any, url: str, file: HubFile, folder: Path, counter: _Counter, wait_s: float) -> None:
    """One file, going on with what an earlier run left; a second time from the start if its digest is wrong."""
    path, part = folder / file.name, _part_of(folder, file)
    found = ""
    for _ in range(2):
        with _Part(part, file, counter) as sink:
            _stream(hub, url, sink, wait_s)
            found = sink.digest
        if found == file.digest:
            os.replace(part, path)
            sync(folder)
            return
        part.unlink()
        counter.add(-file.nbytes)
    kind = "SHA-256" if file.sha256 is not None else "Git blob id"
    raise CheckpointError(
        f"{file.name} arrived twice with the {kind} {found}, but the Hub gives {file.digest}: something on the way "
        "alters it (a proxy, the disk, memory). It was removed. Try another network or machine."
    )


class _Part:
    """A file that is arriving; what an earlier run left of it counts."""

    def __init__(self, path: Path, file: HubFile, counter: _Counter) -> None:
        self.path, self.file, self._counter = path, file, counter
        self._hasher, self.have = file.hasher(), 0
        if path.exists() and path.stat().st_size <= file.nbytes:
            self.have = _read_into(path, self._hasher)
        self._out = path.open("r+b" if self.have else "wb")
        self._out.seek(self.have)
        counter.add(self.have)

    @property
    def digest(self) -> str:
        return str(self._hasher.hexdigest())

    def take(self, chunk: bytes) -> None:
        """Append bytes, at most as many as are missing. Raises: CheckpointError when the disk refuses."""
        chunk = chunk[: self.file.nbytes - self.have]
        try:
            self._out.write(chunk)
            self._out.flush()
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else f"the disk refuses: {error.strerror or error}"
            raise CheckpointError(
                f"{self.file.name} cannot be written to {self.path.parent}: {why}, after {self.have:,} of "
                f"{self.file.nbytes:,} bytes. Free some space, then run the same command: it goes on from there."
            ) from error
        self._hasher.update(chunk)
        self.have += len(chunk)
        self._counter.add(len(chunk))

    def restart(self) -> None:
        """Forget everything: the server sends the file from its beginning."""
        self._out.seek(0)
        self._out.truncate()
        self._counter.add(-self.have)
        self._hasher, self.have = self.file.hasher(), 0

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        if kind is None:
            self._out.flush()
            os.fsync(self._out.fileno())
        with contextlib.suppress(OSError):  # of a full disk, which was reported
            self._out.close()


def _stream(hub: Any, url: str, sink: _Part, wait_s: float) -> None:
    """Fill `sink` up to its file's size; after a failure again from where it stands."""
    failures, size, name = 0, sink.file.nbytes, sink.file.name
    while sink.have < size:
        before, reason = sink.have, "the server ended it early"
        try:
            for chunk in _chunks(hub, url, sink.have):
                if chunk is None:
                    sink.restart()
                    before = 0
                else:
                    sink.take(chunk)
        except CheckpointError:
            raise
        except _Refused as error:
            raise CheckpointError(
                f"the Hub refuses {name} ({error}), so the download stopped at {sink.have:,} of {size:,} bytes. Check "
                "access rights and HF_TOKEN, then run the same command: it goes on from there."
            ) from error
        except Exception as error:  # network errors of whichever HTTP library the Hub's client uses
            reason = f"{type(error).__name__}: {_first_line(error)}"
        if sink.have >= size:
            return
        failures = 1 if sink.have > before else failures + 1
        if failures > _TRIES:
            raise CheckpointError(
                f"the download of {name} broke off at {sink.have:,} of {size:,} bytes, and {_TRIES} retries brought "
                f"nothing more ({reason}). Check the network, then run the same command: it goes on from there."
            )
        time.sleep(wait_s * 2 ** (failures - 1))


def _part_of(folder: Path, file: HubFile) -> Path:
    """Where a file arrives; its digest is in the name, so bytes of another revision are not taken for its own."""
    return folder / f".{file.name}.{file.digest[:16]}.part"


class _Refused(Exception):
    """An answer that trying again would not change."""


def _chunks(hub: Any, url: str, start: int) -> Iterator[bytes | None]:
    """The file's bytes from `start` on; a leading None when the server sends it from the beginning instead."""
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with hub.get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as response:
        if response.status_code in (401, 403, 404, 410, 451):
            raise _Refused(f"HTTP {response.status_code}")
        response.raise_for_status()
        if start and response.status_code != 206:
            yield None
        yield from response.iter_bytes()  # as they come: what has arrived when a connection drops is kept


def _check_space(folder: Path, wanted: list[HubFile]) -> None:
    parts = [_part_of(folder, file) for file in wanted]
    there = sum(part.stat().st_size for part in parts if part.exists())
    needed, free = sum(file.nbytes for file in wanted) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder} needs {needed:,} bytes more, but its disk has {free:,} free, {needed - free:,} too few. Nothing "
            "was fetched. Free some space or name a folder on another disk with --to."
        )


def _is_there(file: HubFile, result: Pulled, counter: _Counter) -> bool:
    """Whether the file is in the folder as the Hub has it; noted in `result`."""
    path = result.folder / file.name
    if not path.exists():
        return False
    hasher = file.hasher()
    if path.stat().st_size == file.nbytes:
        _read_into(path, hasher)
        if hasher.hexdigest() == file.digest:
            result.kept.append(file.name)
            counter.add(file.nbytes)
            return True
    result.replaced.append(file.name)
    return False


def _read_into(path: Path, hasher: Any) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            hasher.update(chunk)
            total += len(chunk)
    return total


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
