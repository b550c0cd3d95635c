"""A bounded cache of routed experts whose weights stay on disk: the least recently used one makes room.

Experts are known by layer and number and lie in equal slots of one reservation of memory. Threads of the cache read
them; those that a call waits for come first, those that were only expected after them. Three rules beyond plain LRU:

    a call takes what is there first and computes it while the rest is read
    what a call uses stays until its group is computed, so a call may want more experts than there are slots
    a call that wants more than half of the slots (a long prompt) passes what it reads through a few of them: it would
        push out everything else and still find nothing of its own the next time

Source: the idea of experts streamed under a memory budget is ds4's (antirez); rules are ours.
"""

import itertools
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.checkpoint.direct_io import room
from rorqual.checkpoint.expert_files import ExpertReader
from rorqual.ops.packed_weight import PackedWeight
from rorqual.ops.streamed_experts import PLACES

Key = tuple[str, int]
"""Layer (name of its stack) and number of an expert."""

AHEAD = 12
"""Experts that a call passing through holds at a time, at most; a quarter of the slots if that is less."""

WANTED, EXPECTED = 0, 1
"""Order of reading."""


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was made, and what it holds."""

    hits: int
    """Wanted experts that were there, or on their way for another call."""
    prefetch_hits: int
    """Wanted experts whose reading had begun because they were expected."""
    misses: int
    bytes_read: int
    prefetches: int
    """Experts read because they were expected, whether they were wanted in the end or not."""
    waited_s: float
    """Time that calls waited for experts."""
    resident_bytes: int
    """Memory of slots that were ever filled."""
    capacity_bytes: int
    slots: int
    experts: int
    """Of the whole model."""

    @property
    def hit_rate(self) -> float:
        """Share of wanted experts that were not misses; 1 before the first."""
        wanted = self.hits + self.prefetch_hits + self.misses
        return 1.0 if not wanted else (self.hits + self.prefetch_hits) / wanted


class _Slot:
    """A place for one expert. All fields are the cache's, under its lock, but for memory, which is its reader's."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.places: list[int] | None = None
        """Addresses of what lies there; None while it is on its way."""
        self.error: Exception | None = None
        self.users = 0
        self.is_expected = False
        """Whether it was expected and not yet used."""
        self.has_begun = False


Tasks = queue.PriorityQueue[tuple[int, int, Key | None, _Slot | None]]
"""What is to be read: order, number, and what; nothing for a thread that is to end."""


class ExpertCache:
    """Holds up to `slots` experts of a reader, read by `threads` threads. Any number of threads may use it at once."""

    def __init__(self, reader: ExpertReader, slots: int, threads: int = 4) -> None:
        self.reader = reader
        self._changed = threading.Condition()
        self._memory = room(slots * reader.slot_bytes).view(slots, reader.slot_bytes)
        self._free = [_Slot(self._memory[number]) for number in reversed(range(slots))]
        self._num_slots, self._num_filled = slots, 0
        self._held: OrderedDict[Key, _Slot] = OrderedDict()
        """By use, the coldest first."""
        self._hits = self._prefetch_hits = self._misses = self._prefetches = self._bytes_read = 0
        self._waited_s = 0.0
        self._expected = 0
        self._queue: Tasks = queue.PriorityQueue()
        self._order = itertools.count()
        for number in range(threads):
            name = f"expert reader {number}"
            threading.Thread(target=_read, args=(self._queue, weakref.ref(self)), name=name, daemon=True).start()
        weakref.finalize(self, _stop, self._queue, threads)

    def layer(self, name: str) -> "CachedExperts":
        """The experts of the stack called `name`."""
        return CachedExperts(self, name)

    def stats(self) -> CacheStats:
        """Counts so far."""
        with self._changed:
            size = self.reader.slot_bytes
            return CacheStats(
                self._hits, self._prefetch_hits, self._misses, self._bytes_read, self._prefetches, self._waited_s,
                self._num_filled * size, self._num_slots * size, self._num_slots, len(self.reader.files),
            )  # fmt: skip

    def groups(self, layer: str, wanted: Sequence[int], *, in_order: bool) -> Iterator[Tensor]:
        """See `StreamedExperts.groups`."""
        places = torch.zeros(self.reader.shape[0], PLACES, dtype=torch.int64)
        passing: set[int] | None = set() if len(wanted) > self._num_slots // 2 else None
        held: dict[int, _Slot] = {}
        with self._changed:
            there = [] if in_order else [e for e in wanted if (layer, e) in self._held]
            left = [*there, *(e for e in wanted if e not in set(there))]
        left.reverse()
        try:
            while held or left:
                group = self._next_group(layer, left, held, passing, in_order)
                for e, slot in group.items():
                    assert slot.places is not None
                    places[e] = torch.tensor(slot.places)
                yield places
                places[list(group)] = 0
                self._release(layer, group, passing)
                for e in group:
                    del held[e]
        finally:
            self._release(layer, held, passing)

    def _next_group(
        self, layer: str, left: list[int], held: dict[int, _Slot], passing: set[int] | None, in_order: bool
    ) -> dict[int, _Slot]:
        """Begin to read as many of the experts in `left` (the next one last) as have room, and wait until one of those
        that are held, which must be the first of them if `in_order`, is there.

        passing: of a call that passes through, those that it has read.
        """
        begin = time.perf_counter()
        with self._changed:
            while True:
                while left and (slot := self._take(layer, left[-1], held, passing)) is not None:
                    held[left.pop()] = slot
                failed = next((slot.error for slot in held.values() if slot.error is not None), None)
                if failed is not None:
                    raise failed
                ready = {e: slot for e, slot in held.items() if slot.places is not None}
                if in_order and held:
                    first = next(iter(held))
                    ready = {first: held[first]} if first in ready else {}
                if ready:
                    self._waited_s += time.perf_counter() - begin
                    return ready
                self._changed.wait()

    def matrices(self, places: list[int]) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """w1, w3 and w2 that lie at these addresses of a slot."""
        number = (places[0] - self._memory.data_ptr()) // self.reader.slot_bytes
        return self.reader.matrices(places, self._memory[number])

    def _take(self, layer: str, expert: int, held: dict[int, _Slot], passing: set[int] | None) -> _Slot | None:
        """The slot where an expert is or will be, held for the caller; None when all that it may use are in use."""
        key = (layer, expert)
        slot = self._held.get(key)
        if slot is None:
            most = max(1, min(AHEAD, self._num_slots // 4))
            if passing is not None and not self._free and len(passing & held.keys()) >= most:
                return None
            slot = self._begin(key, WANTED)
            if slot is None:
                return None
            self._misses += 1
            if passing is not None:
                passing.add(expert)
        elif slot.is_expected:
            self._prefetch_hits += 1
            if passing is not None:
                passing.add(expert)
            slot.is_expected = False
            self._expected -= 1
            if not slot.has_begun:  # it waits behind others that are only expected
                self._queue.put((WANTED, next(self._order), key, slot))
        else:
            self._hits += 1
        slot.users += 1
        if passing is None:
            self._held.move_to_end(key)
        return slot

    def _begin(self, key: Key, order: int) -> _Slot | None:
        """Find a slot for an expert and have it read; None when all are in use."""
        if self._free:
            slot = self._free.pop()
            self._num_filled += 1
        else:
            coldest = next(
                (one for one, slot in self._held.items() if not slot.users and slot.places is not None), None
            )
            if coldest is None:
                return None
            slot = self._held.pop(coldest)
            if slot.is_expected:
                self._expected -= 1
        slot.places, slot.error, slot.has_begun, slot.is_expected = None, None, False, order == EXPECTED
        self._held[key] = slot
        self._queue.put((order, next(self._order), key, slot))
        return slot

    def _release(self, layer: str, group: dict[int, _Slot], passing: set[int] | None) -> None:
        with self._changed:
            for e, slot in group.items():
                slot.users -= 1
                if slot.error is not None:
                    self._forget((layer, e), slot)
                elif passing is not None and e in passing and not slot.users:
                    self._held.move_to_end((layer, e), last=False)
            self._changed.notify_all()

    def _forget(self, key: Key, slot: _Slot) -> None:
        """Let the next call try again to read what could not be read."""
        if not slot.users and self._held.get(key) is slot:
            del self._held[key]
            self._num_filled -= 1
            self._free.append(slot)

    def expect(self, layer: str, wanted: Sequence[int]) -> None:
        """Begin to read experts that will be wanted soon, as far as a quarter of the slots allows for all layers."""
        with self._changed:
            for e in wanted:
                key = (layer, e)
                if key in self._held:
                    self._held.move_to_end(key)
                    continue
                if self._expected >= self._num_slots // 4 or self._begin(key, EXPECTED) is None:
                    return
                self._expected += 1
                self._prefetches += 1

    def fill(self, key: Key, slot: _Slot) -> None:
        """Read an expert into its slot; on a thread of the cache."""
        with self._changed:
            if slot.has_begun or self._held.get(key) is not slot:
                return
            slot.has_begun = True
        error: Exception | None = None
        places, nbytes = [0] * PLACES, 0
        try:
            places, nbytes = self.reader.read(*key, slot.memory)
        except Exception as caught:  # the call that waits for it must hear of it, whatever it is
            error = caught
        with self._changed:
            slot.places, slot.error = None if error else places, error
            self._bytes_read += nbytes
            if error is not None and not slot.users:
                self._expected -= slot.is_expected
                slot.is_expected = False
                self._forget(key, slot)
            self._changed.notify_all()


class CachedExperts:
    """The experts of one layer, as `ops/streamed_experts.py` asks for them."""

    def __init__(self, cache: ExpertCache, name: str) -> None:
        self.cache, self.name = cache, name
        self.format, self.shape = cache.reader.kind, cache.reader.shape

    def groups(self, wanted: Sequence[int], *, in_order: bool = False) -> Iterator[Tensor]:
        """See `StreamedExperts`."""
        return self.cache.groups(self.name, wanted, in_order=in_order)

    def matrices(self, places: Tensor, expert: int) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """See `StreamedExperts`."""
        return self.cache.matrices(places[expert].tolist())

    def expect(self, wanted: Sequence[int]) -> None:
        """See `StreamedExperts`."""
        self.cache.expect(self.name, wanted)


def _read(tasks: Tasks, cache: weakref.ref[ExpertCache]) -> None:
    """What a thread of a cache does until the cache is gone."""
    while True:
        _, _, key, slot = tasks.get()
        alive = cache()
        if key is None or slot is None or alive is None:
            return
        alive.fill(key, slot)
        del alive, slot


def _stop(tasks: Tasks, threads: int) -> None:
    for number in range(threads):
        tasks.put((WANTED, -1 - number, None, None))
