"""Records of the disk cache: a page of entries or a window checkpoint, with what it belongs to and two checksums.

    0   magic "RQr1"          4   alive (1, or 0 once discarded: the only byte that is ever written again)
    5   kind (0 page, 1 checkpoint)    8  number of token ids, uint32       12  bytes of the hidden state, uint32
    16  key (16)              32  key of the page before (16)
    48  position, uint64      56  bytes of the content, uint64     64  checksum of the content, uint64
    72  checksum of header and token ids (8)            80  zeros to 128
    128 token ids, int32, zeros to a multiple of 64; then hidden state and content, zeros to a multiple of 64

All little-endian. A record is written by one call and never changed, so it is whole or its checksums say that it is
not. The token ids stand in it, so that a match is by equality and not by a hash.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.store.checksum import checksum

HEADER = 128
ALIGN = 64
ALIVE_AT = 4
MAGIC = b"RQr1"
_LAYOUT = struct.Struct("<4sBBHII16s16sQQQ")
_DIGEST_AT = _LAYOUT.size  # 72
_DIGEST = 8

Kind = Literal[0, 1]
PAGE: Kind = 0
POINT: Kind = 1


def padded(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class Header:
    """A record without its content."""

    kind: int
    key: bytes
    parent: bytes
    position: int
    tokens: bytes
    """int32 ids: of a page all of them, of a checkpoint those behind the last full page."""
    content_bytes: int
    hidden_bytes: int = 0
    content_sum: int = 0
    is_alive: bool = True

    @cached_property
    def data_at(self) -> int:
        """Where hidden state and content begin, from the record's start."""
        return HEADER + padded(len(self.tokens))

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of hidden state and content, padding included."""
        return padded(self.hidden_bytes + self.content_bytes)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole record."""
        return self.data_at + self.data_bytes


def encode(header: Header, hidden: bytes, content: NDArray[np.uint8]) -> bytearray:
    """A record as bytes; the content's checksum is computed here."""
    out = bytearray(header.nbytes)
    view = np.frombuffer(out, dtype=np.uint8)
    at = header.data_at
    view[at : at + len(hidden)] = np.frombuffer(hidden, dtype=np.uint8)
    view[at + len(hidden) : at + len(hidden) + len(content)] = content
    total = checksum(view[at:].view(np.uint64))
    out[: _LAYOUT.size] = _LAYOUT.pack(
        MAGIC, 1, header.kind, 0, len(header.tokens) // 4, header.hidden_bytes, header.key, header.parent,
        header.position, header.content_bytes, total,
    )  # fmt: skip
    out[HEADER : HEADER + len(header.tokens)] = header.tokens
    out[_DIGEST_AT : _DIGEST_AT + _DIGEST] = _digest(out[: _LAYOUT.size], header.tokens)
    return out


def _digest(head: bytes | bytearray, tokens: bytes) -> bytes:
    plain = bytearray(head)
    plain[ALIVE_AT] = 0
    return hashlib.blake2b(bytes(plain) + tokens, digest_size=_DIGEST).digest()


def num_tokens(head: bytes) -> int | None:
    """How many token ids follow a header's 128 bytes; None when this is no header."""
    if len(head) < HEADER or head[:4] != MAGIC:
        return None
    return int(_LAYOUT.unpack(head[: _LAYOUT.size])[4])


def decode(head: bytes, tokens: bytes) -> Header | None:
    """A header from its 128 bytes and its token ids; None when they are damaged."""
    if len(head) < HEADER or head[:4] != MAGIC or head[_DIGEST_AT : _DIGEST_AT + _DIGEST] != _digest(
        head[: _LAYOUT.size], tokens
    ):  # fmt: skip
        return None
    _, alive, kind, _, count, hidden, key, parent, position, content, total = _LAYOUT.unpack(head[: _LAYOUT.size])
    if count * 4 != len(tokens) or kind not in (PAGE, POINT):
        return None
    return Header(kind, key, parent, position, tokens, content, hidden, total, bool(alive))
