"""Safetensors files, one or many: strict reading with errors that help, atomic writing.

A checkpoint folder holds either `model.safetensors`, or shards `model-00001-of-00003.safetensors` with
`model.safetensors.index.json` (tensor name -> shard). Headers are checked here before the safetensors library
maps the data, so a truncated download is reported with the bytes that are there and the bytes that should be.

Format: 8 bytes (little-endian length n), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rorqual.checkpoint.direct_io import DirectFiles, copy_numbers
from rorqual.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPORARY = ".*.tmp"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own bound
_BITS_OF = {
    4: "F4",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64",
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Those of tensors that a model reads."""
_BITS = {dtype: bits for bits, dtypes in _BITS_OF.items() for dtype in dtypes.split()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `dtype` in safetensors' words: `F32`, `BF16`, `F8_E4M3`, `I8`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int
    """Where its data begin in the file, in bytes."""


class CheckpointFiles:
    """The tensors of one checkpoint folder, readable by name. Use as a context manager.

    is_direct: tensors are read past the page cache into memory of their own; otherwise files are mapped.
    Raises: CheckpointError (on creation) when files are missing, damaged or contradict each other.
    """

    def __init__(self, folder: str | Path, *, is_direct: bool = False) -> None:
        self.folder, self.is_direct = Path(folder), is_direct
        self._direct = DirectFiles()
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()
        weight_map, paths = _find_files(self.folder)
        for path in paths:
            for info in read_header(path):
                if info.name in self.tensors:
                    raise CheckpointError(
                        f"tensor {info.name} is in both {self.tensors[info.name].path} and {path}, so it is "
                        "unclear which one counts. Remove the stale shard, or save the checkpoint again into "
                        "an empty folder."
                    )
                self.tensors[info.name] = info
        if weight_map is not None:
            _check_index(self.folder / INDEX, weight_map, self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype."""
        path = self.tensors[name].path
        if self.is_direct:
            value = torch.empty(self.tensors[name].shape, dtype=DTYPES[self.tensors[name].dtype])
            self.copy(name, value)
            return value
        try:
            if path not in self._handles:
                self._handles[path] = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
            return self._handles[path].get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{path} could not be read at tensor {name} ({error}), so loading cannot go on. Check the "
                "disk, or copy or download this file again."
            ) from error

    def copy(self, name: str, target: Tensor) -> None:
        """One tensor past the page cache into a contiguous one of its shape, cast to its dtype."""
        info = self.tensors[name]
        copy_numbers(self._direct, info.path, info.start, DTYPES[info.dtype], target)

    def close(self) -> None:
        """Release the mapped files."""
        self._handles.clear()
        self._stack.close()

    def read_one(self, name: str, index: int) -> Tensor:
        """`read(name)[index]`: the file is mapped, so only that part of it is read, and when it is used."""
        return self.read(name)[index]

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def read_header(path: Path) -> list[TensorInfo]:
    """Check a safetensors file's header against its size; return its tensors in file order.

    Raises: CheckpointError naming the file, the bytes expected and found, and what to do.
    """
    again = "Copy or download the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            header = file.read(length) if length <= _HEADER_LIMIT else b""
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}. Check the path and its permissions."
        ) from error
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path} has {size} bytes, but a safetensors file begins with 8 bytes of header length: it is "
            f"empty or truncated. {again}"
        )
    if length > _HEADER_LIMIT or prefix + header[:1] == b"version ":
        raise CheckpointError(
            f"{path} begins with {prefix!r}, which is no safetensors header length (a Git LFS pointer or "
            f"another kind of file looks like this). {again}"
        )
    if len(header) < length:
        raise CheckpointError(
            f"{path} is truncated inside its header: {8 + length} bytes expected for it, the file has {size}. {again}"
        )
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("the header is not an object")
        infos, data_bytes = _read_entries(path, entries, 8 + length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged header ({error}), so its tensors cannot be located. {again}"
        ) from error
    expected = 8 + length + data_bytes
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {expected} bytes expected, the file has {size} ({expected - size} missing). {again}"
        )
    if size > expected:
        raise CheckpointError(
            f"{path} has {size} bytes, {size - expected} more than the {expected} its header describes: it "
            f"is damaged. {again}"
        )
    return infos


def write_checkpoint(folder: str | Path, shards: Sequence[Sequence[str]], make: Callable[[str], Tensor]) -> list[Path]:
    """Write tensors to `folder`, one file per group of names in `shards`; returns the files written.

    One group becomes `model.safetensors`; several become numbered shards with an index. `make(name)` gives a
    tensor when its shard is written, so only one shard is in memory at a time. Every file is written beside
    its place, synced and renamed; older model files of the folder are removed last, so an interrupted save
    leaves either the old or the new file under each name, never half of one.

    Raises: CheckpointError when the disk refuses.
    """
    folder = Path(folder)
    count = len(shards)
    names = shard_names(count)
    weight_map: dict[str, str] = {}
    total = 0
    unnamed: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, group in zip(names, shards, strict=True):
            tensors = {name: make(name).detach().cpu().contiguous() for name in group}
            path = temporary(folder / file_name)
            unnamed.append(path)
            save_tensors(tensors, path, metadata={"format": "pt"})
            sync(path)
            total += sum(t.nbytes for t in tensors.values())
            weight_map |= dict.fromkeys(group, file_name)
        for path, file_name in zip(unnamed, names, strict=True):
            os.replace(path, folder / file_name)
        if count > 1:
            write_index(folder, weight_map, total)
        for stale in model_files(folder):
            if stale.name not in names and not (count > 1 and stale.name == INDEX):
                stale.unlink()
        sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint to {folder}: {error}. Check free space and permissions, then save again."
        ) from error
    finally:
        for path in unnamed:
            path.unlink(missing_ok=True)
    return [folder / name for name in names]


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint in so many files."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index of a checkpoint in several files: tensor name -> file, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one file that whoever the process's umask lets may read; the safetensors library makes it private."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


def write_text(path: Path, text: str | bytes) -> None:
    """Write a small file so that a reader sees either the old content or the new, even after a crash."""
    beside = temporary(path)
    try:
        beside.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
        sync(beside)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}. Check free space and permissions, then save again."
        ) from error


# ---------------------------------------------------------------- finding and checking


def _find_files(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """The index's tensor -> file map (None without an index) and the files to read."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, so there is no checkpoint to read. Check the path.")
    if (folder / INDEX).exists():
        weight_map = _read_index(folder / INDEX)
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{folder / INDEX} names {len(absent)} of {len(names)} files that are not there: "
                f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}. Their tensors cannot be "
                "loaded. Copy or download the missing shards."
            )
        return weight_map, [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return None, [folder / SINGLE]
    shards = [path for path in model_files(folder) if _SHARD.fullmatch(path.name)]
    if not shards:
        raise CheckpointError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, so it has no weights to load. Point at the folder "
            "that has them beside config.json."
        )
    counts = {int(path.stem.rsplit("-", 1)[1]) for path in shards}
    if counts != {len(shards)}:
        raise CheckpointError(
            f"{folder} has no {INDEX} and {len(shards)} shards that say they are of {sorted(counts)}: some "
            "are missing. Copy or download the whole checkpoint again."
        )
    return None, shards


def _read_index(path: Path) -> dict[str, str]:
    fix = "Copy or download the index again, or delete it if every shard is there."
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        weight_map = document["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is not a filled object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a usable index ({error}), so shards cannot be found. {fix}") from error
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and file_name.endswith(".safetensors") and not set(file_name) & set("/\\:\0")
        if not plain:
            raise CheckpointError(
                f"{path} places tensor {name} in {file_name!r}, which is not a plain .safetensors file name. "
                f"Rorqual reads only files of the checkpoint's own folder. {fix}"
            )
    return weight_map


def _check_index(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    wrong = [
        f"{name} (index: {weight_map.get(name, 'absent')}, found in: "
        f"{tensors[name].path.name if name in tensors else 'no shard'})"
        for name in sorted(set(weight_map) | set(tensors))
        if name not in tensors or weight_map.get(name) != tensors[name].path.name
    ]
    if wrong:
        raise CheckpointError(
            f"{path} and the shards disagree on {len(wrong)} tensors: {'; '.join(wrong[:3])}. Shards of "
            "different saves seem to be mixed. Copy or download the whole checkpoint again."
        )


def _read_entries(path: Path, entries: dict[str, Any], first: int) -> tuple[list[TensorInfo], int]:
    """Tensors of a decoded header in data order, and the bytes of data they fill without gap or overlap.

    first: where the data begin in the file.
    """
    infos: list[TensorInfo] = []
    end_of_last = 0
    described = ((name, entry) for name, entry in entries.items() if name != "__metadata__")
    for name, entry in sorted(described, key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in _BITS:
            raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"tensor {name} has the impossible shape {list(shape)}")
        wanted = math.prod(shape) * _BITS[dtype] // 8
        if start != end_of_last or end - start != wanted:
            raise ValueError(
                f"tensor {name} lies at bytes {start} to {end} of the data, but {wanted} bytes from "
                f"{end_of_last} were expected"
            )
        infos.append(TensorInfo(name, path, dtype, shape, wanted, first + start))
        end_of_last = end
    return infos, end_of_last


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is listed twice")
    return out


def model_files(folder: Path) -> list[Path]:
    """Files of a folder that belong to a checkpoint's weights by their names."""
    return [path for path in sorted(folder.iterdir()) if path.name in (SINGLE, INDEX) or _SHARD.fullmatch(path.name)]


def temporary(path: Path) -> Path:
    """Where a file is written before it gets its name; `TEMPORARY` finds what a killed process left."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Push a file (or a folder's entries) to the disk; systems that cannot sync folders are left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
