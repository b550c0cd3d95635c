"""`Tokens`, by far the most frequent record of a rollout, and its fixed layout.

    20 bytes         request 8, first position 4, count 2, flags 2, policy version 4
    count x 4        ids
    count x 4        log-probabilities, as 32-bit floats, with flag 1
    16 each          with flags 2 and 4: references to a top-p mask and to the experts that were chosen

All little endian.
"""

import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rorqual.errors import JournalError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens drawn in one engine step of one request (TOKENS); acknowledged once this record is durable.

    `logprobs` are kept as 32-bit floats. `mask` and `routing` are 16-byte references to a top-p mask and to the
    experts that were chosen.
    """

    TYPE: ClassVar[int] = 2
    request: int
    first_position: int
    policy_version: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    mask: bytes | None = None
    routing: bytes | None = None


_TOKENS = struct.Struct("<QIHHI")  # request, first position, count, flags, policy version
PAIR = struct.Struct("<If")  # a token and its log-probability
ONE_TOKEN = struct.Struct("<QIHHIIf")  # the same and one token with its log-probability
HAS_LOGPROBS, HAS_MASK, HAS_ROUTING = 1, 2, 4
MOST_TOKENS = 2**16 - 1
TOKENS_HEAD_BYTES = _TOKENS.size

_Numbers = TypeVar("_Numbers", int, "npt.NDArray[np.int64]")


def tokens_layout(count: _Numbers, flags: _Numbers) -> tuple[_Numbers, _Numbers, _Numbers]:
    """Of `Tokens` payloads with so many ids and these flags: number of log-probabilities, bytes of references, bytes.

    For one record or for arrays of them.
    """
    logprobs = count * (flags & HAS_LOGPROBS)
    references = 16 * ((flags & HAS_MASK) // HAS_MASK + (flags & HAS_ROUTING) // HAS_ROUTING)
    return logprobs, references, TOKENS_HEAD_BYTES + 4 * (count + logprobs) + references


def check_tokens_head(request: int, first_position: int, policy_version: int) -> None:
    """Raises: struct.error when one of these does not fit its place in a `Tokens` record."""
    _TOKENS.pack(request, first_position, 1, HAS_LOGPROBS, policy_version)


def pack_tokens(request: int, first_position: int, policy_version: int, pairs: bytes | bytearray) -> bytes:
    """The payload of a `Tokens` record from PAIRs one behind the other."""
    words = array("I", pairs)
    head = _TOKENS.pack(request, first_position, len(words) // 2, HAS_LOGPROBS, policy_version)
    return head + words[::2].tobytes() + words[1::2].tobytes()


def encode_tokens(record: Tokens) -> bytes:
    """The fixed layout: header, ids (u32 each), log-probabilities (f32 each), 16-byte references.

    Raises: JournalError when a value does not fit its place.
    """
    ids, logprobs = record.ids, record.logprobs
    try:
        if len(ids) == 1 and logprobs is not None and record.mask is None and record.routing is None:
            (logprob,) = logprobs
            return ONE_TOKEN.pack(
                record.request, record.first_position, 1, HAS_LOGPROBS, record.policy_version, ids[0], logprob
            )
        return _encode_many(record)
    except UNFIT as error:
        raise unfit(record.request, error) from None


UNFIT = (struct.error, TypeError, ValueError, OverflowError)
"""What a value raises that does not fit its place."""


def unfit(request: object, error: Exception) -> JournalError:
    """The refusal of a `Tokens` record for one of UNFIT."""
    return JournalError(
        f"a Tokens record of request {request!r} cannot be stored: {error}. Positions, versions and ids are 32 bits, "
        f"the request 64 bits, all at least 0; there is one log-probability an id."
    )


def _encode_many(record: Tokens) -> bytes:
    ids, logprobs = record.ids, record.logprobs
    if not 0 < len(ids) <= MOST_TOKENS:
        raise ValueError(f"it has {len(ids)} ids, and a record holds 1 to {MOST_TOKENS}")
    flags, layout, values = 0, f"<{len(ids)}I", list[Any](ids)
    if logprobs is not None:
        if len(logprobs) != len(ids):
            raise ValueError(f"it has {len(logprobs)} log-probabilities for {len(ids)} ids")
        flags, layout = HAS_LOGPROBS, f"{layout}{len(ids)}f"
        values += logprobs
    for flag, reference in ((HAS_MASK, record.mask), (HAS_ROUTING, record.routing)):
        if reference is not None:
            if len(reference) != 16:
                raise ValueError(f"a reference has {len(reference)} bytes instead of 16")
            flags, layout = flags | flag, f"{layout}16s"
            values.append(reference)
    head = _TOKENS.pack(record.request, record.first_position, len(ids), flags, record.policy_version)
    return head + struct.pack(layout, *values)


def decode_tokens(payload: bytes | memoryview) -> Tokens:
    """Raises: ValueError when the length is not what the header says."""
    if len(payload) == ONE_TOKEN.size:
        request, first, count, flags, version, token, logprob = ONE_TOKEN.unpack(payload)
        if count == 1 and flags == HAS_LOGPROBS:
            return Tokens(request, first, version, (token,), (logprob,))
    if len(payload) < _TOKENS.size:
        raise ValueError(f"a Tokens record of {len(payload)} bytes")
    request, first, count, flags, version = _TOKENS.unpack_from(payload)
    num_logprobs, reference_bytes, length = tokens_layout(count, flags)
    if flags > 7 or len(payload) != length:
        raise ValueError(f"a Tokens record of {len(payload)} bytes for {count} ids and flags {flags}")
    num_references = reference_bytes // 16
    values = struct.unpack_from(f"<{count}I{num_logprobs}f{'16s' * num_references}", payload, _TOKENS.size)
    references = iter(values[len(values) - num_references :])
    return Tokens(
        request,
        first,
        version,
        values[:count],
        values[count : 2 * count] if flags & HAS_LOGPROBS else None,
        next(references) if flags & HAS_MASK else None,
        next(references) if flags & HAS_ROUTING else None,
    )
