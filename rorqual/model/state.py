"""Everything a sequence must remember: what each layer does (`layer_state.py`), token ids and lengths, by batch row.

The rings are longer than the network needs by `rewind` tokens, so that a state can be cut back exactly: entries of
dropped tokens are hidden by the visibility rule until rewritten. Further back there are snapshots, a state as bytes.

B batch rows.
"""

import contextlib
import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex

import safetensors.torch
import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import CacheError
from rorqual.model.cache_format import is_lossless
from rorqual.model.guard import Guard, Shown
from rorqual.model.layer_state import LayerState, Pending, Recall, new_layer, recalls
from rorqual.model.layout import Layout
from rorqual.model.page_table import Paged, PageTable
from rorqual.model.pages import PagePool

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer

__all__ = ["LayerState", "Pending", "Recall", "State", "fingerprint", "recalls", "restore"]

MAX_SNAPSHOTS = 16
"""How many of its own snapshots a state remembers."""

_MAGIC = b"rorqual-state-1\n"
_DIGEST = 16


@dataclass
class _Snapshot:
    """A remembered point; it holds for the rows that have not been cut back below it or replaced since."""

    lengths: list[int]
    data: bytes
    rows: set[int]


@dataclass
class State:
    """The memory of a batch of sequences; rows advance independently.

    Made by `Transformer.new_state`. `rewind` is how many tokens each row can always be cut back exactly.
    """

    model: "Transformer"
    rewind: int
    layers: list[LayerState]
    lengths: list[int]
    tokens: Tensor
    """Token ids seen so far, int32 [B, capacity]: what a rewind behind the margin recomputes from."""
    floor: list[int]
    """Per row, the shortest length the rings can still be cut back to."""
    snapshots: list[_Snapshot] = field(default_factory=list)
    segments: list[int | None] = field(default_factory=list)
    """Per row, the id of the packed document the last token belonged to (see `Transformer.forward`)."""
    interrupted: bool = False
    """A call stopped half-way, so layers disagree about what they have seen."""
    table: PageTable | None = None
    """The pages of a paged state: one row, whose entries and index keys lie in a `PagePool`."""
    decoding: Any = field(default=None, repr=False, compare=False)
    """Where the fused decode step finds this state's tensors (`decode_memory.Memory`)."""
    cache_format: str = ""
    """The model's when this was made (see `cache_format.py`)."""
    index_search: str = ""
    """The model's when this was made (`ModelConfig.index_search`)."""
    guard: Guard | None = None
    """What its queries are shown besides what the indexer picks; one row only. See `guard_by`."""
    frozen: int = 0
    """Tokens whose entries came from elsewhere, complete: up to there tokens are only run again for the windows."""

    def __post_init__(self) -> None:
        self.cache_format = self.cache_format or self.model.cfg.cache_format
        self.index_search = self.index_search or self.model.cfg.index_search

    @classmethod
    def empty(cls, model: "Transformer", batch_size: int, rewind: int, pool: PagePool | None = None) -> "State":
        """A state that has seen nothing, with its entries in `pool` if there is one.

        Raises CacheError for a negative rewind, an empty batch, or several rows with a pool.
        """
        if batch_size < 1 or rewind < 0:
            raise CacheError(
                f"new_state(batch_size={batch_size}, rewind={rewind}): a state needs at least one row and a margin "
                "of 0 or more tokens."
            )
        if pool is not None and batch_size != 1:
            raise CacheError(
                f"new_state(batch_size={batch_size}) with a page pool: pages belong to one sequence, so a paged state "
                "has one row. Make one state a sequence."
            )
        like = model.reference
        with torch.inference_mode(False):  # usable in and out of inference mode
            layers = [new_layer(model.cfg, spec, batch_size, rewind, like) for spec in model.cfg.layers]
            tokens = torch.zeros(batch_size, 0, dtype=torch.int32, device=like.device)
        state = cls(model, rewind, layers, [0] * batch_size, tokens, [0] * batch_size, segments=[None] * batch_size)
        if pool is not None:
            state.attach(PageTable(pool))
        return state

    def guard_by(self, guard: Guard | None) -> None:
        """From the next token on, show queries what `guard` says, a guard of this state alone (None: nothing).

        Tokens read before stay as they were read, so a state's text is best read with one guard from its beginning.
        Raises: CacheError for a state of several rows.
        """
        if guard is not None and self.batch_size != 1:
            raise CacheError(
                f"A state of {self.batch_size} rows was to get a retrieval guard, which looks at one sequence. Make a "
                "state a sequence: model.new_state(1)."
            )
        self.guard = guard

    def shown(self, ids: Sequence[int]) -> Shown | None:
        """What the queries of the next tokens must be shown; None without a guard."""
        return None if self.guard is None else self.guard.shown(self.tokens[0], self.lengths[0], ids)

    def attach(self, table: PageTable, frozen: int = 0) -> None:
        """Let entries and index keys lie in the pages of `table`, whose first `frozen` tokens are complete there.

        Entries of the tokens held so far must already be in them. Entries of frozen tokens are never written again.
        """
        self.table, self.frozen = table, frozen
        for layer, spec in zip(self.layers, self.model.cfg.layers, strict=True):
            for name in ("entries", "index_keys"):
                layer.groups = None
                if getattr(layer, name) is not None:
                    pool, ratio = table.pool.tensor(spec.index, name), spec.compress_ratio
                    held = max(self.lengths[0], frozen) // ratio
                    setattr(layer, name, Paged(pool, table, ratio, held, frozen // ratio))

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many more tokens: the pages they need belong to this state alone afterwards.

        Raises CacheError when a paged state's pool is full; nothing has changed then.
        """
        if self.table is not None:
            self.table.ensure(max(self.lengths[0], self.frozen), max(self.lengths[0] + num_tokens, self.frozen))

    @property
    def is_replaying(self) -> bool:
        """Whether the next token's entries are there already, so that only the layer code may run it."""
        return self.lengths[0] < self.frozen

    @property
    def is_exact(self) -> bool:
        """False while tokens before `floor` are run again from an unknown window; until then results mean nothing."""
        return all(floor <= length for floor, length in zip(self.floor, self.lengths, strict=True))

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def begin(self, num_tokens: int = 0) -> None:
        """Called by the model before the layers store anything. Raises CacheError for a state that cannot go on."""
        self.check(num_tokens)
        self.interrupted = True

    def check(self, num_tokens: int = 0) -> None:
        """Make sure that the state can take in so many tokens. Raises CacheError when it cannot go on."""
        like = self.model.reference
        window = self.layers[0].window
        if self.interrupted:
            raise CacheError(
                "An earlier call with this state stopped half-way (an error or an interrupt), so its layers disagree "
                "about what they have seen. Restore a snapshot, or start from a new state."
            )
        if window.dtype != like.dtype or window.device != like.device:
            raise CacheError(
                f"The state holds {window.dtype} on {window.device}, the model is {like.dtype} on {like.device} now. "
                "Make the state after moving or casting the model."
            )
        if self.cache_format != self.model.cfg.cache_format:
            raise CacheError(
                f"The state keeps its rows in the cache format {self.cache_format!r}, and the model's is "
                f"{self.model.cfg.cache_format!r} now. Make the state after choosing the format."
            )
        if self.index_search != self.model.cfg.index_search:
            raise CacheError(
                f"The state was made with index_search={self.index_search!r}, and the model's is "
                f"{self.model.cfg.index_search!r} now. Make the state after choosing the search."
            )
        self.reserve(num_tokens)

    def _make_room(self, length: int) -> None:
        """Let `tokens` hold `length` ids per row."""
        if length > self.tokens.shape[1]:
            with torch.inference_mode(False):
                grown = self.tokens.new_zeros(self.batch_size, max(length, 2 * self.tokens.shape[1], 64))
            grown[:, : self.tokens.shape[1]] = self.tokens
            self.tokens = grown

    def advance(self, tokens: Tensor, layout: Layout) -> None:
        """Account for a call that every layer has stored; called by the model."""
        self._make_room(max(s + n for s, n in zip(layout.start, layout.lengths, strict=True)))
        self.interrupted = False
        for row, (start, count) in enumerate(zip(layout.start, layout.lengths, strict=True)):
            self.tokens[row, start : start + count] = tokens[row, :count]
            self.lengths[row] = start + count
            self.floor[row] = max(self.floor[row], start + count - self.rewind)

    def advance_each(self, ids: Sequence[int], count: int = 1) -> None:
        """As `advance`, for `count` tokens a row: those of the first row, then those of the next."""
        self._make_room(max(self.lengths) + count)
        self.interrupted = False
        seen = self.tokens.numpy()  # which takes a number in faster than a tensor does
        for row, length in enumerate(self.lengths):
            seen[row, length : length + count] = ids[row * count : (row + 1) * count]
            self.lengths[row] = length + count
            self.floor[row] = max(self.floor[row], length + count - self.rewind)

    def hold(self, tokens: Tensor) -> None:
        """Make this one row count as having seen `tokens`, int [n]; what they leave behind the caller fills in."""
        self._make_room(tokens.shape[0])
        if self.guard is not None:
            self.guard = self.guard.anew()
        self.tokens[0, : tokens.shape[0]] = tokens
        self.lengths[0] = tokens.shape[0]

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget all tokens from `length` on (one number for all rows, or one per row).

        Exact down to `floor` (at least `rewind` tokens behind the longest length reached). Further back the nearest
        earlier snapshot of this state is restored and the rest recomputed. Raises CacheError when there is none, or
        when a row is shorter than asked; nothing has changed then.
        """
        wanted = _whole_numbers(length, self.batch_size)
        if len(wanted) != self.batch_size or any(not 0 <= w <= n for w, n in zip(wanted, self.lengths, strict=True)):
            raise CacheError(
                f"truncate({length}) on a state of lengths {self.lengths}: a row can only be cut to a length from 0 to "
                "its own. Give one whole number that every row has, or one per row."
            )
        rebuilt: dict[int, State] = {}
        for row, target in enumerate(wanted):
            if 0 < target < self.floor[row]:
                rebuilt[row] = self._recompute(row, target)
        for row, target in enumerate(wanted):
            if row in rebuilt:
                self._take_row(row, rebuilt[row])
            elif target == 0:
                self.floor[row], self.segments[row] = 0, None
            self.lengths[row] = target
        self._cut_groups()
        self._cut_pages()
        self._forget_snapshots(dict(enumerate(wanted)))

    def _cut_groups(self) -> None:
        """What groups hold of keys behind the rows' lengths, which will be written anew."""
        for layer, spec in zip(self.layers, self.model.cfg.layers, strict=True):
            if layer.groups is not None:
                layer.groups.cut([length // spec.compress_ratio for length in self.lengths])

    def _cut_pages(self) -> None:
        """Release pages behind the length of a paged state; what is left of frozen tokens stays so."""
        if self.table is None:
            return
        length = self.lengths[0]
        self.frozen = min(self.frozen, length)
        self.table.truncate(length)
        for layer in self.layers:
            for part in layer.paged().values():
                part.length, part.frozen = length // part.ratio, self.frozen // part.ratio

    def _forget_snapshots(self, longest: dict[int, int]) -> None:
        """Snapshots no longer hold for the rows named here when they are longer than the length beside the row."""
        for snapshot in self.snapshots:
            snapshot.rows -= {row for row, length in longest.items() if snapshot.lengths[row] > length}
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.rows]

    def _recompute(self, row: int, target: int) -> "State":
        """A one-row state of `target` tokens, from the nearest snapshot of this row at or before it."""
        usable = [s for s in self.snapshots if row in s.rows and s.lengths[row] <= target]
        if not usable:
            raise CacheError(
                f"Row {row} holds {self.lengths[row]} tokens and can be cut back exactly to {self.floor[row]}, "
                f"not to {target}: "
                f"its rings keep only {self.rewind} tokens of margin and no snapshot was taken at or before {target}. "
                "Call state.snapshot() earlier, use a larger new_state(rewind=...), or start from a new state."
            )
        best = max(usable, key=lambda s: s.lengths[row])
        state = restore(self.model, best.data).rows([row])
        missing = self.tokens[row : row + 1, best.lengths[row] : target].long()
        if missing.shape[1]:
            state.guard_by(None if self.guard is None else self.guard.anew())
            with torch.no_grad():
                self.model.forward_streams(missing, state=state)
        return state

    def rows(self, rows: Sequence[int]) -> "State":
        """A copy of some rows (in that order, repeats allowed) as a state of its own.

        The copy of one paged row is paged: it shares full pages and copies the open one. Several are not.
        """
        with torch.inference_mode(False):
            if self.table is not None and len(rows) != 1:
                return self.contiguous().rows(rows)
            index = torch.tensor(list(rows), device=self.tokens.device)
            layers = [layer.map(lambda t: t.index_select(0, index)) for layer in self.layers]
            tokens = self.tokens.index_select(0, index)
        copy = State(
            self.model,
            self.rewind,
            layers,
            [self.lengths[r] for r in rows],
            tokens,
            [self.floor[r] for r in rows],
            segments=[self.segments[r] for r in rows],
            interrupted=self.interrupted,
        )
        if self.guard is not None and len(rows) == 1:
            copy.guard = self.guard.copy()
        if self.table is not None:
            copy._hold_pages_of(self)
        return copy

    def _hold_pages_of(self, other: "State") -> None:
        """Share what `other`, of the same length, has in pages."""
        assert other.table is not None
        table = other.table.fork(max(other.lengths[0], other.frozen))
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name, part in theirs.paged().items():
                setattr(mine, name, part)  # for `attach`, which puts another in its place
        self.attach(table, other.frozen)

    def contiguous(self) -> "State":
        """A copy that shares nothing and lies in no pages."""
        with torch.inference_mode(False):
            layers = [LayerState.of({name: t.clone() for name, t in layer.contents().items()}) for layer in self.layers]
            tokens = self.tokens.clone()
        lengths, floor, segments = list(self.lengths), list(self.floor), list(self.segments)
        copy = State(
            self.model, self.rewind, layers, lengths, tokens, floor, segments=segments, interrupted=self.interrupted
        )
        copy.guard = None if self.guard is None else self.guard.copy()
        return copy

    def put_row(self, row: int, other: "State") -> None:
        """Replace one row by the only row of `other`; snapshots taken earlier no longer hold for it.

        Raises CacheError unless `other` has one row and the same model and rewind margin.
        """
        if other.model is not self.model or other.rewind != self.rewind or other.batch_size != 1:
            raise CacheError(
                f"put_row takes a state of one row of the same model with rewind={self.rewind}; this one has "
                f"{other.batch_size} rows and rewind={other.rewind}. Use other.rows([i]) of a state made alike."
            )
        self._take_row(row, other)
        self._forget_snapshots({row: -1})

    def _take_row(self, row: int, other: "State") -> None:
        if self.table is not None:
            self.table.truncate(0)
            self.table.ensure(0, other.lengths[0])
            self.frozen = 0
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.groups = None
            for name, value in theirs.contents().items():
                part = mine.paged().get(name)
                if part is not None:
                    part.length = part.frozen = 0
                    part.append(value[:, : other.lengths[0] // part.ratio])
                    continue
                target = mine.tensors()[name]
                if value.shape[1] > target.shape[1]:  # entries may have other capacities
                    with torch.inference_mode(False):
                        grown = target.new_zeros(target.shape[0], value.shape[1], target.shape[2])
                    grown[:, : target.shape[1]] = target
                    setattr(mine, name, grown)
                    target = grown
                target[row, : value.shape[1]] = value[0]
        count = other.lengths[0]
        if self.guard is not None:
            self.guard = self.guard.anew()
        self._make_room(count)
        self.tokens[row, :count] = other.tokens[0, :count]
        self.lengths[row], self.floor[row], self.segments[row] = count, other.floor[0], other.segments[0]

    def fork(self) -> "State":
        """An independent copy: what happens to one never shows in the other."""
        copy = self.rows(range(self.batch_size))
        copy.snapshots = [dataclasses.replace(s, rows=set(s.rows)) for s in self.snapshots]
        return copy

    def nbytes(self) -> dict[str, int]:
        """Bytes held by each part: window, entries, index_keys, pending, (where there is one) engram, remembered
        snapshots, and their total.
        """
        out = {"window": 0, "entries": 0, "index_keys": 0, "pending": 0}
        out["snapshots"] = sum(len(s.data) for s in self.snapshots)
        for layer in self.layers:
            for name, value in layer.tensors().items():
                part = "pending" if "pending" in name else name.split(".")[0]
                out[part] = out.get(part, 0) + value.nbytes
            for name, pages in layer.paged().items():
                out[name] += pages.nbytes
            if layer.groups is not None:
                out["index_groups"] = out.get("index_groups", 0) + layer.groups.nbytes
        if self.guard is not None:
            out["guard"] = self.guard.nbytes
        return {**out, "total": sum(out.values())}

    def snapshot(self, remember: bool = True) -> bytes:
        """The state as bytes for `Transformer.restore`; with `remember`, also a point this state can rewind to.

        Holds rings, entries and token ids, a digest against damage and the configuration's fingerprint, no weights.
        The newest `MAX_SNAPSHOTS` are remembered. Raises CacheError for a state whose last call stopped half-way.
        """
        if self.interrupted:
            raise CacheError(
                "This state's last call stopped half-way; a snapshot of it would be wrong. Start a new state."
            )
        if not self.is_exact:
            raise CacheError(
                f"This state of {self.lengths} tokens is running again what its windows forgot and is exact from "
                f"{self.floor} on; a snapshot before that would be wrong. Feed it the tokens up to there first."
            )
        tensors = {"tokens": self.tokens[:, : max(self.lengths)].contiguous()}
        for i, (layer, spec) in enumerate(zip(self.layers, self.model.cfg.layers, strict=True)):
            for name, value in layer.contents().items():
                if name in ("entries", "index_keys"):
                    value = value[:, : max(self.lengths) // spec.compress_ratio]
                tensors[f"{i}.{name}"] = value.contiguous()
        meta = {
            "lengths": ",".join(map(str, self.lengths)),
            "floor": ",".join(map(str, self.floor)),
            "rewind": str(self.rewind),
            "segments": json.dumps(self.segments),
            "model": fingerprint(self.model.cfg),
        }
        payload = safetensors.torch.save({name: value.cpu() for name, value in tensors.items()}, meta)
        data = _MAGIC + hashlib.blake2b(payload, digest_size=_DIGEST).digest() + payload
        if remember:
            self._remember(data)
        return data

    def _remember(self, data: bytes) -> None:
        kept = [s for s in self.snapshots if s.lengths != self.lengths]
        self.snapshots = [*kept, _Snapshot(list(self.lengths), data, set(range(self.batch_size)))][-MAX_SNAPSHOTS:]


def _whole_numbers(given: object, rows: int) -> list[int]:
    """One whole number for all rows, or one per row, as a list; an empty one for anything else."""
    if type(given) is int:  # as when drafts are taken back, round after round: asking for a protocol takes longer
        return [given] * rows
    if isinstance(given, SupportsIndex):  # a tensor or an array too, of which only one of a single element is a number
        with contextlib.suppress(TypeError):
            return [operator.index(given)] * rows
    if isinstance(given, Iterable):
        with contextlib.suppress(TypeError):
            return [operator.index(number) for number in given]
    return []


def fingerprint(cfg: ModelConfig) -> str:
    """Identifies what a state depends on: the configuration without `extra`, and without parts that V4 has not."""
    left_out = {"extra"} | ({"engram"} if not cfg.engram else set()) | ({"cache_format"} if is_lossless(cfg) else set())
    left_out |= {"index_search"} if cfg.index_search == "exact" else set()
    known = (f.name for f in dataclasses.fields(cfg) if f.name not in left_out)
    settings = sorted((name, repr(getattr(cfg, name))) for name in known)
    return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()


def restore(model: "Transformer", data: bytes) -> State:
    """Rebuild a state from `State.snapshot` bytes. Raises CacheError when they are damaged or of another model."""
    head = len(_MAGIC) + _DIGEST
    if data[: len(_MAGIC)] != _MAGIC:
        raise CacheError(
            "These bytes are not a Rorqual state snapshot (wrong header). Pass what State.snapshot() returned."
        )
    payload = bytes(data[head:])
    if hashlib.blake2b(payload, digest_size=_DIGEST).digest() != data[len(_MAGIC) : head]:
        raise CacheError(
            f"The state snapshot of {len(data)} bytes is damaged: its checksum does not match. "
            "Take a new snapshot, or prefill the prompt again."
        )
    length = int.from_bytes(payload[:8], "little")
    meta: dict[str, str] = json.loads(payload[8 : 8 + length])["__metadata__"]
    if meta["model"] != fingerprint(model.cfg):
        raise CacheError(
            "The state snapshot belongs to a model of another configuration, so its entries mean nothing here. "
            "Restore it with the model that took it."
        )
    with torch.inference_mode(False):
        tensors = {k: v.to(model.embed.weight.device) for k, v in safetensors.torch.load(payload).items()}
    layers = []
    for i in range(len(model.cfg.layers)):
        layers.append(
            LayerState.of({k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".", 1)[0] == str(i)})
        )
    lengths = [int(n) for n in meta["lengths"].split(",")]
    floor = [int(n) for n in meta["floor"].split(",")]
    state = State(
        model,
        int(meta["rewind"]),
        layers,
        lengths,
        tensors["tokens"],
        floor,
        segments=json.loads(meta["segments"]),
    )
    if layers[0].window.dtype != model.embed.weight.dtype:
        raise CacheError(
            f"The state snapshot was taken in {layers[0].window.dtype}, the model runs in {model.embed.weight.dtype}. "
            "Cast the model as it was, or prefill the prompt again."
        )
    state._remember(bytes(data))
    return state
