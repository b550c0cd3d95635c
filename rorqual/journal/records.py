"""The records of a rollout: what they hold and their bytes.

A record is a frozen dataclass. `Tokens`, by far the most frequent, has a fixed layout (`tokens`); the others are a
MessagePack map of their fields by name. Every record of a request carries the request's number, so that one stream of
segments serves all requests of a worker. `Event` is for logs of other owners (the history of a sandbox).

What journal code knows of records ends here: it stores them and gives them back, and draws no conclusions.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import msgpack  # type: ignore[import-untyped]

from rorqual.errors import JournalError
from rorqual.journal.tokens import Tokens as Tokens
from rorqual.journal.tokens import decode_tokens, encode_tokens

INLINE_OUTPUT_BYTES = 32 * 1024
"""Output of a tool up to this size lies in its `ToolResult`; larger output is an object and the record refers to it."""

_MOST_U64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Request:
    """A request begins (REQ_OPEN); written before its first token."""

    TYPE: ClassVar[int] = 1
    trajectory: str
    request: int
    """Number of the request, unique in this journal; the other records name it."""
    branch: int = 0
    prompt_digest: bytes = b""
    """SHA-256 over the prompt's token ids."""
    prompt_ref: str = ""
    """Where the prompt's token ids lie."""
    sampling: dict[str, Any] = field(default_factory=dict)
    seed_key: bytes = bytes(16)
    """128-bit key of the counter-based generator."""
    model_id: str = ""
    policy_version: int = 0
    tokenizer_digest: str = ""
    engine_fingerprint: str = ""
    lease: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class PolicySwitch:
    """The weights changed in the middle of a request (POLICY_SWITCH)."""

    TYPE: ClassVar[int] = 3
    request: int
    position: int
    old_version: int
    new_version: int


@dataclass(frozen=True, slots=True)
class KVReference:
    """The cache of tokens [first_position, end_position) was saved as an object (KV_REF)."""

    TYPE: ClassVar[int] = 4
    request: int
    first_position: int
    end_position: int
    digest: str
    layout: str = ""
    dtype: str = ""
    engine_fingerprint: str = ""
    policy_version: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool is about to be called (TOOL_INTENT); durable before the call leaves the worker."""

    TYPE: ClassVar[int] = 5
    request: int
    call_index: int
    tool: str
    arguments: str
    """The canonical form of the arguments, `rorqual.journal.canonical`."""
    key: bytes
    """16 bytes, `rorqual.journal.call_key`."""
    branch: int = 0
    sandbox_id: str = ""
    incarnation: int = 0
    expected_journal_seq: int = 0
    external: bool = False
    """Reaches outside the sandbox: recovery never runs it again."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered (TOOL_RESULT); durable before the model sees it.

    `flags` are the owner's (truncated, timed out, out of memory, ...). `output` holds at most 32 KiB; what is larger
    lies at `output_ref`. `observation_ids` are the tokens that the model is given, replayed as they are.
    """

    TYPE: ClassVar[int] = 6
    request: int
    call_index: int
    key: bytes
    exit_code: int | None = 0
    flags: int = 0
    output_digest: bytes = b""
    output: bytes = b""
    output_ref: str = ""
    observation_ids: tuple[int, ...] = ()
    replayed: bool = False
    branch: int = 0


@dataclass(frozen=True, slots=True)
class EnvSnapshot:
    """A snapshot of a sandbox is durable (ENV_SNAPSHOT) and covers its history up to `journal_seq`."""

    TYPE: ClassVar[int] = 7
    sandbox_id: str
    snapshot_id: str
    kind: str
    journal_seq: int
    request: int | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """An owner (re)started (ATTACH)."""

    TYPE: ClassVar[int] = 8
    owner: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Owners of an epoch before this one may write no more (FENCE)."""

    TYPE: ClassVar[int] = 9
    owner: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """An interruption begins (PREEMPT). `tier`: A, B or C of resuming, where it is known already."""

    TYPE: ClassVar[int] = 10
    cause: str
    durable_lsn: int
    tier: str | None = None
    request: int | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """An interruption is over (RESUME); `tier` says how the cache came back: A restored, B step by step, C prefill."""

    TYPE: ClassVar[int] = 11
    cause: str
    durable_lsn: int
    tier: str | None = None
    request: int | None = None


@dataclass(frozen=True, slots=True)
class RngNote:
    """A sampler used `draws` draws beyond the first at a position (RNG_NOTE)."""

    TYPE: ClassVar[int] = 12
    request: int
    position: int
    draws: int


@dataclass(frozen=True, slots=True)
class Reward:
    """Rewards by name (REWARD) and the digest of the verifier that gave them."""

    TYPE: ClassVar[int] = 13
    request: int
    values: dict[str, float]
    verifier_digest: str = ""


@dataclass(frozen=True, slots=True)
class Close:
    """A request ended (REQ_CLOSE): why, totals by name, and a digest over all its token ids."""

    TYPE: ClassVar[int] = 14
    request: int
    stop_reason: str
    totals: dict[str, Any] = field(default_factory=dict)
    ids_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of somebody else's log: a kind and fields that MessagePack can hold (tuples come back as lists)."""

    TYPE: ClassVar[int] = 64
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)


Record = (
    Request
    | Tokens
    | PolicySwitch
    | KVReference
    | ToolCall
    | ToolResult
    | EnvSnapshot
    | Attach
    | Fence
    | Preempt
    | Resume
    | RngNote
    | Reward
    | Close
    | Event
)

RECORDS: tuple[type[Record], ...] = (
    Request,
    Tokens,
    PolicySwitch,
    KVReference,
    ToolCall,
    ToolResult,
    EnvSnapshot,
    Attach,
    Fence,
    Preempt,
    Resume,
    RngNote,
    Reward,
    Close,
    Event,
)
BY_TYPE: dict[int, type[Record]] = {cls.TYPE: cls for cls in RECORDS}
_FIELDS: dict[type[Record], tuple[str, ...]] = {cls: tuple(f.name for f in fields(cls)) for cls in RECORDS}


def encode(record: Record) -> bytes:
    """The payload of a record.

    Raises: JournalError when it is no record or a value of it cannot be stored; nothing was written then.
    """
    if type(record) is Tokens:
        return encode_tokens(record)
    names = _FIELDS.get(type(record))
    if names is None:
        raise JournalError(
            f"{type(record).__name__} is no record of the journal. Use one of "
            f"{', '.join(cls.__name__ for cls in RECORDS)}; Event takes what fits none of the others."
        )
    values = {name: getattr(record, name) for name in names}
    _check(type(record).__name__, values)
    try:
        packed: bytes = msgpack.packb(values)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise JournalError(
            f"a {type(record).__name__} record cannot be stored: {error}. Its values must be None, bools, ints of 64 "
            f"bits, floats, str, bytes, or lists and dicts of these, nested less than 500 deep."
        ) from None
    return packed


_NUMBERS = ("request", "branch", "call_index", "position", "policy_version", "epoch", "draws", "durable_lsn")
_SIXTEEN = ("seed_key", "key")


def _check(kind: str, values: dict[str, Any]) -> None:
    """What MessagePack would take but a reader could not use."""
    for name in _NUMBERS:
        number = values.get(name)
        if number is not None and (type(number) is not int or not 0 <= number <= _MOST_U64):
            raise JournalError(f"{kind}.{name} is {number!r}. It must be a whole number of 0 to 64 bits.")
    for name in _SIXTEEN:
        key = values.get(name)
        if key is not None and (type(key) is not bytes or len(key) != 16):
            raise JournalError(f"{kind}.{name} is {key!r}. It must be 16 bytes.")
    output = values.get("output")
    if kind == "ToolResult" and output is not None and len(output) > INLINE_OUTPUT_BYTES:
        raise JournalError(
            f"ToolResult.output has {len(output):,} bytes, more than the {INLINE_OUTPUT_BYTES:,} that lie in the "
            f"journal. Store it as an object and give output_ref and output_digest."
        )


def decode(kind: int, payload: bytes | memoryview) -> Record:
    """The record of a payload. Raises: ValueError when the payload is none of that type."""
    if kind == Tokens.TYPE:
        return decode_tokens(payload)
    cls = BY_TYPE.get(kind)
    if cls is None:
        raise ValueError(f"records of type {kind} are unknown to this version")
    try:
        values = msgpack.unpackb(payload, strict_map_key=False)
        if cls is ToolResult:
            values["observation_ids"] = tuple(values["observation_ids"])
        return cls(**values)
    except (msgpack.UnpackException, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"no {cls.__name__} record: {error}") from None


def request_of(kind: int, payload: bytes | memoryview) -> int | None:
    """The request a record belongs to; None for records of no request. Raises: ValueError, like `decode`."""
    if kind == Tokens.TYPE:
        return int.from_bytes(payload[:8], "little")
    request: int | None = getattr(decode(kind, payload), "request", None)
    return request
