"""Which compressed entries a query must be shown, found in the tokens before it: anchors, pinned spans, lexical hits.

An indexer may overlook an entry that repeats the words of the question. Here n-grams of 1 to 3 tokens are looked up
where they stood before, entries are scored by how rare what they share with the question is, and the best ones are
shown with what follows them. Source: evaluation specification, section 6.2. Departures: rarity counts squared and
n-grams near the end of what is looked up count more, as otherwise the common words around a question outweigh its
key; n-grams of every order are left out where they stand in more than `cut` entries; the last tokens' hits go before
the message's; of hits close together one counts.

What a query is shown is a function of the tokens up to it and of the policy, whatever way they came in.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rorqual.ops import registry
from rorqual.ops.native import library

ORDERS = 3
LOOKED_AT, MOST_CUT = 64, 256
"""Best entries that are looked at for hits; the largest `cut`."""
NO_ROLE, ASKS, ANSWERS = 0, 1, 2
"""Of a token: it begins what is asked (a user's message), or what is not."""

Ints = NDArray[np.int64]


class Policy(NamedTuple):
    """What is forced, in entries unless it says otherwise; the C source has the same fields in the same order."""

    ratio: int
    """Tokens of an entry."""
    window: int
    """Tokens of the sliding window, which need no entry."""
    first: int = 0
    last: int = 0
    """Anchors: the first entries, and the last ones that hold a token from before the window."""
    system_first: int = 0
    system_last: int = 0
    pinned_most: int = 0
    """Of the system message its first and last ones; of all pinned ones so many at most."""
    recent: int = 64
    message: int = 512
    """Tokens whose n-grams are looked up: the last ones, and the last ones of the latest message that asks."""
    half: int = 32
    """An n-gram counts half for every so many tokens that it stands before the end of what is looked up."""
    cut: int = 64
    """An n-gram in more entries than this says nothing."""
    hits: int = 16
    back: int = 1
    behind: int = 8
    visits: int = 512
    """Entries that are looked at for the last tokens, and for the message, the rarest n-grams first."""
    lexical_most: int = 0
    """Best entries, what is shown before and behind each, and how many in all."""

    @property
    def width(self) -> int:
        """Most entries of a query."""
        return self.first + self.last + self.pinned_most + self.lexical_most


class Forced(NamedTuple):
    """Of T queries: entries int64 [T, F] ascending with -1 behind, how many [T], and by kind [T, 3] (anchors, pinned,
    lexical). All three are views of one array, which C fills.
    """

    entries: Ints
    sizes: Ints
    kinds: Ints
    address: int
    """Of the entries."""


def force_reference(
    tokens: Sequence[int], query: int, policy: Policy, roles: NDArray[np.uint8], pins: Sequence[tuple[int, int]] = ()
) -> tuple[list[int], list[int]]:
    """Entries that the query at place `query` must be shown, ascending, and how many came by each kind."""
    end, ratio = (query + 1) // policy.ratio, policy.ratio
    shown: set[int] = set()

    def show(begin: int, stop: int, room: int) -> int:
        new = [entry for entry in range(max(begin, 0), min(stop, end)) if entry not in shown][: max(room, 0)]
        shown.update(new)
        return len(new)

    hidden = query - policy.window  # the last token behind the window, which two entries hold
    near = hidden // ratio + 2 if hidden >= 0 else 0
    anchors = show(0, policy.first, policy.first) + show(near - policy.last, near, policy.last)
    left = policy.pinned_most
    for begin, stop in pins:
        stop = min(stop, query + 1)
        if begin < stop and left > 0:
            left -= show(begin // ratio, (stop - 1) // ratio + 2, left)
    role_of = [int(roles[token]) if token < len(roles) else NO_ROLE for token in tokens[: query + 1]]
    system = next((place for place, role in enumerate(role_of) if role), 0)
    if system:
        last = (system - 1) // ratio + 1
        left -= show(0, min(last, policy.system_first), left)
        left -= show(last - policy.system_last, last, left)
    lexical = 0
    if policy.lexical_most:
        begin = max(0, query + 1 - policy.recent)
        done: set[tuple[int, ...]] = set()
        lexical = _best(tokens, query, policy, begin, query + 1, done, shown, policy.lexical_most)
        asks = max((place for place, role in enumerate(role_of) if role == ASKS), default=-1)
        if asks >= 0 and lexical < policy.lexical_most:
            ends = (place for place in range(asks + 1, query + 1) if role_of[place] == ANSWERS)
            stop = min(begin, next(ends, query + 1))
            low = max(asks + 1, stop - policy.message)
            # a term that stands in both ranges may be scored twice: what was done is kept by place, not by term
            lexical += _best(tokens, query, policy, low, stop, set(), shown, policy.lexical_most - lexical)
    return sorted(shown), [anchors, policy.pinned_most - left, lexical]


def _best(
    tokens: Sequence[int], query: int, policy: Policy, begin: int, stop: int, done: set[tuple[int, ...]],
    shown: set[int], room: int,
) -> int:  # fmt: skip
    """Show what follows the entries that share most with the n-grams ending in [begin, stop); how many are new."""
    end, ratio = (query + 1) // policy.ratio, policy.ratio
    scores: dict[int, int] = {}
    terms: list[tuple[int, int, int, list[int]]] = []
    for place in range(stop - 1, begin - 1, -1):
        for order in range(ORDERS, 0, -1):
            term = tuple(tokens[place - order + 1 : place + 1]) if place >= order - 1 else ()
            if not term or term in done:
                continue
            done.add(term)
            places = [at for at in range(order - 1, place + 1) if tuple(tokens[at - order + 1 : at + 1]) == term]
            spread = len({at // ratio for at in places})
            if spread <= min(policy.cut, MOST_CUT) and len(places) > 1:
                terms.append((spread, order, stop - 1 - place, places))
    visits = 0
    for spread, order, age, places in sorted(terms, key=lambda term: term[0]):
        visits += spread
        if visits > policy.visits:
            break
        rarity = max(0.0, math.log2((end + 1) / (spread + 1)))
        weight = round(256.0 * order * rarity * rarity) >> min(age // policy.half, 60)
        for entry in {at // ratio for at in places if at <= query - policy.window} if weight else ():
            if entry < end:
                scores[entry] = scores.get(entry, 0) + weight
    ranked = sorted(scores, key=lambda entry: (-scores[entry], -entry))[:LOOKED_AT]
    taken = hits = 0
    for entry in ranked:
        if hits == min(policy.hits, LOOKED_AT) or taken >= room:
            break
        if entry in shown:
            continue
        new = [
            entry,
            *(e for e in range(max(0, entry - policy.back), min(end, entry + policy.behind + 1)) if e != entry),
        ]
        new = [e for e in new if e not in shown][: room - taken]
        shown.update(new)
        taken, hits = taken + len(new), hits + 1
    return taken


class _Next(NamedTuple):
    """What `Grams.force_next` gives C; `kept` is what the address points at."""

    policy: Policy
    pins: Sequence[tuple[int, int]]
    address: int
    forced: Forced
    kept: tuple[object, ...]


@lru_cache(maxsize=1)
def _columns() -> list[str]:
    """The fields of C's enum Sequence, in order."""
    text = (Path(library.__file__).parent / "forced_entries.c").read_text()
    found = re.search(r"enum Sequence \{([^}]*)\}", text)
    assert found is not None
    return [name.strip().lower() for name in found.group(1).split(",")][:-1]


class Grams:
    """A sequence's tokens, and where each of their n-grams stood before: some 50 to 75 bytes a token."""

    def __init__(self, ratio: int, roles: NDArray[np.uint8]) -> None:
        self.ratio, self.roles, self.length, self.system = ratio, roles, 0, -1
        """`system`: the place of the first token with a role, -1 while there is none."""
        self._begin = frozenset(np.flatnonzero(roles).tolist())
        self._next: _Next | None = None
        self.tokens = np.zeros(0, np.int32)
        self._native = registry.allows("native") and library.load() is not None
        self._grow(256)

    def _grow(self, room: int) -> None:
        kept, length = self.tokens, self.length
        self.tokens = np.zeros(room, np.int32)
        self.tokens[:length] = kept[:length]
        if not self._native:
            return
        self._table_size = 1 << (2 * room).bit_length()
        entries = room // self.ratio + 64
        self._arrays: dict[str, NDArray[Any]] = {
            "before": np.empty((ORDERS, room), np.int32), "spread": np.empty((ORDERS, room), np.int32),
            "table": np.full((ORDERS, self._table_size), -1, np.int32),
            "asked": np.empty(room, np.int32), "closed": np.empty(room, np.int32),
            "scores": np.zeros(entries, np.int64), "touched": np.zeros(entries, np.int32),
            "terms": np.zeros(0, np.int32),
            "done": np.zeros((ORDERS, room), np.uint8), "marks": np.zeros(entries // 64 + 2, np.uint64),
        }  # fmt: skip
        self._take_addresses()
        self._add(0, length)

    def _take_addresses(self) -> None:
        """Once: asking numpy for them takes longer than the search."""
        at = {name: array.ctypes.data for name, array in self._arrays.items()}
        tokens, room, size = self.tokens.ctypes.data, len(self.tokens), self._table_size
        self._to_add = (
            room, size, self.ratio, self.roles.ctypes.data, len(self.roles), at["before"], at["spread"], at["table"],
            at["asked"], at["closed"],
        )  # fmt: skip
        self._to_cut = room, size, at["before"], at["table"]
        self._to_force = tokens, at["before"], at["spread"], at["asked"], at["closed"], room
        self._to_search = at["scores"], at["touched"], at["terms"], at["done"], at["marks"]
        self._next = None

    def _add(self, begin: int, end: int) -> None:
        _kernel("grams_add")(self._to_force[0], begin, end, *self._to_add)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.nbytes + (sum(array.nbytes for array in self._arrays.values()) if self._native else 0)

    @staticmethod
    def most_bytes(length: int, policy: Policy) -> int:
        """Most bytes that one holds of so many tokens, whose room doubles when it runs out."""
        room = max(256, 2 * length)
        entries = room // policy.ratio + 64
        of_tokens = 12 + 9 * ORDERS  # tokens, asked, closed; before, spread, done
        table, terms = 4 * ORDERS << (2 * room).bit_length(), 8 * ORDERS * (policy.recent + policy.message)
        return of_tokens * room + table + terms + 12 * entries + 8 * (entries // 64 + 2)

    def copy(self) -> Grams:
        """One that goes on by itself."""
        other = Grams.__new__(Grams)
        other.__dict__.update(vars(self))
        other.tokens, other._next = self.tokens.copy(), None
        if self._native:
            other._arrays = {name: array.copy() for name, array in self._arrays.items()}
            other._take_addresses()
        return other

    def add(self, ids: Sequence[int] | NDArray[np.int32]) -> None:
        """Take in the next tokens."""
        begin, end = self.length, self.length + len(ids)
        if end > len(self.tokens):
            self._grow(max(end, 2 * len(self.tokens)))
        if end - begin == 1:
            self.tokens[begin] = ids[0]
        else:
            self.tokens[begin:end] = ids
        if self._native:
            self._add(begin, end)
        self.length = end
        if self.system < 0:
            self.system = next((i for i, token in enumerate(ids, begin) if token in self._begin), -1)

    def cut(self, length: int) -> None:
        """Take back the tokens from place `length` on."""
        if length >= self.length:
            return
        if self._native:
            _kernel("grams_remove")(self._to_force[0], self.length, length, *self._to_cut)
        self.length = length
        if self.system >= length:
            self.system = -1

    def force_next(self, token: int, policy: Policy, pins: Sequence[tuple[int, int]] = ()) -> Forced:
        """`add` of one token and `force` of its query; what is returned holds until the next call."""
        place = self.length
        if not self._native or place >= len(self.tokens):
            self.add([token])
            return self.force(policy, place, pins)
        if self._next is None or self._next.policy is not policy or self._next.pins is not pins:
            self._next = self._prepared(policy, pins)
        if self.system < 0 and token in self._begin:
            self.system = place
        _kernel("forced_next")(self._next.address, place, token, max(self.system, 0))
        self.length = place + 1
        return self._next.forced

    def _prepared(self, policy: Policy, pins: Sequence[tuple[int, int]]) -> _Next:
        """Where C finds what it needs, once for many tokens."""
        self._make_terms(policy)
        width = max(policy.width, 1)
        room = np.empty((1, width + 4), np.int64)
        numbers, spans = array("q", policy), array("q", [place for pin in pins for place in pin])
        tokens, before, spread, asked, closed, capacity = self._to_force
        values = {
            "tokens": tokens, "before": before, "spread": spread, "table": self._to_cut[3], "asked": asked,
            "closed": closed, "roles": self.roles.ctypes.data, "vocabulary": len(self.roles), "room": capacity,
            "size": self._table_size, "policy": numbers.buffer_info()[0], "pins": spans.buffer_info()[0],
            "num_pins": len(pins), "width": width, "out": room.ctypes.data,
        }  # fmt: skip
        values |= dict(zip(("scores", "touched", "terms", "done", "marks"), self._to_search, strict=True))
        sequence = array("q", [values[name] for name in _columns()])
        forced = Forced(room[:, :width], room[:, width], room[:, width + 1 :], room.ctypes.data)
        return _Next(policy, pins, sequence.buffer_info()[0], forced, (numbers, spans, sequence))

    def _make_terms(self, policy: Policy) -> None:
        terms = 2 * ORDERS * (policy.recent + policy.message)
        if len(self._arrays["terms"]) < terms:
            self._arrays["terms"] = np.zeros(terms, np.int32)
            self._take_addresses()

    def force(self, policy: Policy, first: int, pins: Sequence[tuple[int, int]] = ()) -> Forced:
        """What the queries at places [first, length) must be shown."""
        count, width = self.length - first, max(policy.width, 1)
        room = np.empty((count, width + 4), np.int64)
        out, sizes, kinds = room[:, :width], room[:, width], room[:, width + 1 :]
        if not self._native:
            out.fill(-1)
            tokens = self.tokens[: self.length].tolist()
            for row in range(count):
                entries, kinds[row] = force_reference(tokens, first + row, policy, self.roles, pins)
                out[row, : len(entries)], sizes[row] = entries, len(entries)
            return Forced(out, sizes, kinds, out.ctypes.data)
        numbers, spans = array("q", policy), array("q", [place for pin in pins for place in pin])
        begin = room.ctypes.data
        self._make_terms(policy)
        _kernel("forced_entries")(
            *self._to_force, first, count, numbers.buffer_info()[0], max(self.system, 0), spans.buffer_info()[0],
            len(pins), *self._to_search, width, begin,
        )  # fmt: skip
        return Forced(out, sizes, kinds, begin)


@lru_cache(maxsize=4)
def _kernel(name: str) -> Callable[..., None]:
    return library.kernel(name, bf16=False)[0]
