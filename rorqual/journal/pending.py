"""What waits in memory for the next commit. Not safe for threads by itself: its owner locks.

Frames are made when a batch is taken, all in one go: while a model decodes, each touch of this code finds cold caches,
so the less is done a token the better. For the same reason tokens that come one by one can share a record: it grows
until it is taken, and only then has its bytes.
"""

import zlib
from collections.abc import Iterable

from rorqual.journal import frames
from rorqual.journal.tokens import MOST_TOKENS, PAIR, Tokens, check_tokens_head, pack_tokens

_pack_pair, _MOST_PAIR_BYTES = PAIR.pack, PAIR.size * MOST_TOKENS


class _Growing:
    """A `Tokens` record that takes more tokens until it is committed."""

    __slots__ = ("first", "lsn", "next", "pairs", "request", "version")

    def __init__(self, lsn: int, request: int, first: int, version: int, pair: bytes):
        self.lsn, self.request, self.first, self.version = lsn, request, first, version
        self.pairs, self.next = bytearray(pair), first + 1


_Entry = tuple[bytes, int] | _Growing
"""Payload and type, or a record that still grows."""


class Pending:
    """Records with their LSNs. `seed`: what the checksums start from; `first`: flags of a batch's first frame."""

    def __init__(self, next_lsn: int, seed: int, first: int) -> None:
        self.next_lsn = next_lsn
        """Of the record that comes next."""
        self._seed, self._first = seed, first
        self._entries: list[_Entry] = []
        self._growing: dict[int, _Growing] = {}

    def add(self, payload: bytes, kind: int) -> int:
        """One record; its LSN. Tokens that come later stand behind it."""
        lsn = self.next_lsn
        self._entries.append((payload, kind))
        if self._growing:
            self._growing.clear()
        self.next_lsn = lsn + 1
        return lsn

    def add_many(self, entries: Iterable[tuple[bytes, int]]) -> int:
        """Records one behind the other; the LSN of the last."""
        before = len(self._entries)
        self._entries += entries
        self._growing.clear()
        self.next_lsn += len(self._entries) - before
        return self.next_lsn - 1

    def add_token(self, request: int, position: int, version: int, token: int, logprob: float) -> int:
        """One token, in the record of the one before it where that still waits; the record's LSN.

        Raises: struct.error, TypeError or OverflowError when a value does not fit; nothing was added then.
        """
        growing = self._growing.get(request)
        if (
            growing is not None
            and growing.next == position
            and growing.version == version
            and len(growing.pairs) < _MOST_PAIR_BYTES
        ):
            growing.pairs += _pack_pair(token, logprob)
            growing.next = position + 1
            return growing.lsn
        check_tokens_head(request, position, version)
        lsn = self.next_lsn
        growing = _Growing(lsn, request, position, version, _pack_pair(token, logprob))
        self._growing[request] = growing
        self._entries.append(growing)
        self.next_lsn = lsn + 1
        return lsn

    def take(self) -> tuple[list[_Entry], int]:
        """All that waits, for `frame`, and the LSN of the last. What is added from now on belongs to the next batch."""
        entries, self._entries = self._entries, []
        self._growing.clear()
        return entries, self.next_lsn - 1

    def frame(self, entries: list[_Entry], last_lsn: int) -> bytes:
        """The frames of what was taken. Needs no lock."""
        pack, magic, crc32, seed = frames.HEAD.pack, frames.MAGIC, zlib.crc32, self._seed
        parts: list[bytes] = []
        add, flags, lsn = parts.append, self._first, last_lsn - len(entries) + 1
        for entry in entries:
            if isinstance(entry, tuple):
                payload, kind = entry
            else:
                kind = Tokens.TYPE
                payload = pack_tokens(entry.request, entry.first, entry.version, entry.pairs)
            body = pack(magic, kind, flags, 0, len(payload), lsn) + payload
            add(body)
            add(crc32(body, seed).to_bytes(4, "little"))
            flags = 0
            lsn += 1
        return b"".join(parts)
