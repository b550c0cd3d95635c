"""A sealed segment by columns: the same records in fewer bytes, from which the segment can be made again bit by bit.

    magic 8, index length 4, CRC of the index 4; index (JSON); the columns, each compressed by zlib

The index has the number of records, the SHA-256 of the segment's bytes, the requests it mentions, and for each column
its type, length and CRC. Numbers are stored with their first bytes together, then their second bytes, and so on, which
compresses better. Frames' checksums are not stored: they follow from the rest.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rorqual.errors import JournalError
from rorqual.journal import frames
from rorqual.journal.records import request_of
from rorqual.journal.segments import Segment
from rorqual.journal.tokens import TOKENS_HEAD_BYTES, Tokens, tokens_layout

_MAGIC = b"RQCOLS01"
_PREAMBLE_BYTES = 16
_LEVEL = 4
_TOKENS_HEAD = np.dtype(
    [("request", "<u8"), ("first", "<u4"), ("count", "<u2"), ("flags", "<u2"), ("version", "<u4")], align=False
)
"""`tokens.Tokens`' fixed part, TOKENS_HEAD_BYTES."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Index:
    """What is known of a columnar file without reading its columns."""

    num_records: int
    sha256: str
    """Of the segment's bytes: file header and frames."""
    header: bytes
    """The segment's file header."""
    requests: list[int]
    columns: list[dict[str, Any]]
    start: int
    """Byte where the first column begins."""


def read_index(segment: Segment) -> Index:
    """Raises: JournalError when the beginning of the file is damaged."""
    with segment.path.open("rb") as file:
        preamble = file.read(_PREAMBLE_BYTES)
        length = int.from_bytes(preamble[8:12], "little")
        text = file.read(length) if preamble[:8] == _MAGIC and length < 1 << 30 else b""
    if len(text) != length or not text or zlib.crc32(text) != int.from_bytes(preamble[12:16], "little"):
        raise _damage(segment, 0, "its index does not check")
    values = json.loads(text)
    header = bytes.fromhex(values.pop("header"))
    return Index(header=header, start=_PREAMBLE_BYTES + length, **values)


def num_records(segment: Segment) -> int:
    """Raises: JournalError when the beginning of the file is damaged."""
    return read_index(segment).num_records


def encode_columns(data: memoryview, first_lsn: int, stop_lsn: int) -> bytes:
    """The columnar file of a sealed segment's bytes. Raises: ValueError when a Tokens record is not of its length."""
    header = frames.decode_file_header(data, "the segment")
    found = list(frames.iterate(data, frames.FILE_HEADER_BYTES, first_lsn, header.seed, stop_lsn))
    table = np.array(found, dtype=np.int64).reshape(-1, 5)
    kinds, begin, length = table[:, 1], table[:, 3], table[:, 4] - table[:, 3]
    end = int(table[-1, 4]) + frames.CRC_BYTES if len(table) else frames.FILE_HEADER_BYTES
    buffer = np.frombuffer(data, dtype=np.uint8)
    is_tokens = kinds == Tokens.TYPE
    columns = {"kind": kinds.astype("u1"), "flag": table[:, 2].astype("u1")}
    columns |= _token_columns(buffer, begin[is_tokens], length[is_tokens])
    columns["length"] = length[~is_tokens].astype("<u4")
    columns["blob"] = buffer[_ranges(begin[~is_tokens], length[~is_tokens])]
    return _pack(
        {
            "num_records": len(found),
            "sha256": hashlib.sha256(data[:end]).hexdigest(),
            "header": bytes(data[: frames.FILE_HEADER_BYTES]).hex(),
            "requests": _requests(found, data),
        },
        columns,
    )


def _token_columns(buffer: Array, begin: Array, length: Array) -> dict[str, Array]:
    heads = buffer[begin[:, None] + np.arange(TOKENS_HEAD_BYTES)].reshape(-1).view(_TOKENS_HEAD)
    count = heads["count"].astype(np.int64)
    logprobs, references, expected = tokens_layout(count, heads["flags"].astype(np.int64))
    if np.any(length != expected):
        raise ValueError("a Tokens record has another length than its header says")
    at = begin + TOKENS_HEAD_BYTES
    columns = {name: heads[name].copy() for name in ("request", "first", "count", "flags", "version")}
    columns["id"] = buffer[_ranges(at, 4 * count)].view("<u4")
    columns["logprob"] = buffer[_ranges(at + 4 * count, 4 * logprobs)].view("<u4")
    columns["reference"] = buffer[_ranges(at + 4 * (count + logprobs), references)]
    return columns


def _ranges(begin: Array, length: Array) -> Array:
    """begin[0], begin[0] + 1, ... of each range, one range behind the other."""
    total = int(length.sum())
    before = np.cumsum(length) - length
    return np.repeat(begin - before, length) + np.arange(total)


def _requests(found: list[frames.Found], data: memoryview) -> list[int]:
    return sorted({r for _, kind, _, a, b in found if (r := request_of(kind, data[a:b])) is not None})


def _pack(index: dict[str, Any], columns: dict[str, Array]) -> bytes:
    parts, described = [], []
    for name, column in columns.items():
        size = column.dtype.itemsize
        raw = column.view(np.uint8).reshape(-1, size).T.tobytes()
        packed = zlib.compress(raw, _LEVEL)
        parts.append(packed)
        described.append(
            {"name": name, "dtype": column.dtype.str, "count": len(column), "bytes": len(packed)}
            | {"crc": zlib.crc32(packed)}
        )
    text = json.dumps({**index, "columns": described}).encode()
    head = _MAGIC + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
    return b"".join([head, text, *parts])


def _read_columns(segment: Segment) -> tuple[Index, dict[str, Array]]:
    index = read_index(segment)
    data, at, columns = memoryview(segment.path.read_bytes()), index.start, {}
    for column in index.columns:
        packed = data[at : at + column["bytes"]]
        if zlib.crc32(packed) != column["crc"]:
            raise _damage(segment, at, f"its column {column['name']!r} does not check")
        size = np.dtype(column["dtype"]).itemsize
        raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(size, column["count"])
        columns[column["name"]] = np.ascontiguousarray(raw.T).reshape(-1).view(column["dtype"])
        at += column["bytes"]
    return index, columns


def read_columns(segment: Segment) -> Iterator[tuple[int, int, int, bytes]]:
    """LSN, type, frame flags and payload of each record.

    Raises: JournalError with segment and the offset of the damaged part.
    """
    _, columns = _read_columns(segment)
    payloads, offsets = _payloads(columns)
    kinds, flags = columns["kind"].tolist(), columns["flag"].tolist()
    for number, (kind, flag) in enumerate(zip(kinds, flags, strict=True)):
        yield segment.first_lsn + number, kind, flag, payloads[offsets[number] : offsets[number + 1]]


def _payloads(columns: dict[str, Array]) -> tuple[bytes, list[int]]:
    """All payloads one behind the other, and where each begins."""
    is_tokens = columns["kind"] == Tokens.TYPE
    count = columns["count"].astype(np.int64)
    logprobs, references, tokens_length = tokens_layout(count, columns["flags"].astype(np.int64))
    length = np.empty(len(is_tokens), dtype=np.int64)
    length[is_tokens] = tokens_length
    length[~is_tokens] = columns["length"]
    offsets = np.concatenate([[0], np.cumsum(length)])
    buffer = np.empty(int(offsets[-1]), dtype=np.uint8)
    begin = offsets[:-1][is_tokens]
    heads = np.empty(len(count), dtype=_TOKENS_HEAD)
    for name in ("request", "first", "count", "flags", "version"):
        heads[name] = columns[name]
    buffer[begin[:, None] + np.arange(TOKENS_HEAD_BYTES)] = heads.view(np.uint8).reshape(-1, TOKENS_HEAD_BYTES)
    at = begin + TOKENS_HEAD_BYTES
    buffer[_ranges(at, 4 * count)] = columns["id"].view(np.uint8)
    buffer[_ranges(at + 4 * count, 4 * logprobs)] = columns["logprob"].view(np.uint8)
    buffer[_ranges(at + 4 * (count + logprobs), references)] = columns["reference"]
    buffer[_ranges(offsets[:-1][~is_tokens], length[~is_tokens])] = columns["blob"]
    return buffer.tobytes(), offsets.tolist()


def restore(segment: Segment) -> bytes:
    """The bytes of the segment that a columnar file was made from.

    Raises: JournalError when they are not the ones that were compacted.
    """
    index = read_index(segment)
    seed = frames.decode_file_header(index.header, segment.name).seed
    parts = [index.header]
    parts += [frames.encode_frame(kind, flag, lsn, payload, seed) for lsn, kind, flag, payload in read_columns(segment)]
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != index.sha256:
        raise _damage(segment, index.start, "what it holds has another digest than the segment it was made from")
    return data


def _damage(segment: Segment, offset: int, why: str) -> JournalError:
    return JournalError(
        f"{segment.name} is damaged at byte {offset}: {why}. Records are never skipped; take the trajectories in this "
        f"segment as failed, or restore the file from a copy.",
        segment=segment.name,
        offset=offset,
    )


def path_of(segment: Segment) -> Path:
    """Where the columnar file of a segment lies."""
    return segment.path.with_suffix(".col")
