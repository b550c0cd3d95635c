"""Retrieval guard of one sequence: entries that its queries are shown besides those the indexer picks.

The set a query attends to is a superset of the trained choice, so a guard can add mass and never takes any away. What
is added follows from the tokens up to the query and from the rules alone (`ops/forced_entries.py`), so it is the same
for any cut of the text into calls, after copies, rewinds and restarts. Source: evaluation specification, section 6.

Left out: nothing here reads scores. What does (`recheck`) is done by the layer code, in `model/indexer.py`.

T query tokens, F forced entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.ops.cache_codec import entry_bytes, index_key_bytes
from rorqual.ops.forced_entries import Forced, Grams, Policy

KINDS = ("anchors", "pinned", "lexical")
STEP = 64
"""The indexer's larger choice grows by so many entries, so that neighbouring queries share one."""


@dataclass(frozen=True)
class Rules:
    """What a guard adds. Sizes of the kinds stand in `policy`; `extra` etc. are explained in docs/guard.md."""

    policy: Policy
    extra: float = 0.0
    """E: the factor that the bytes read by a CSA layer may grow by; the indexer's best beyond k fill what is left of
    it. 0: none."""
    neighbours: bool = False
    """N: what two of the three CSA layers before picked for the same token."""
    temporal: bool = False
    """T: what this layer picked for two of the four tokens before and now ranks within 2k."""
    recheck: float = 0.0
    """D: attend to every entry where the k-th score is no further above the next one than this part of the scores'
    standard deviation. 0: never."""

    @property
    def needs_layer_code(self) -> bool:
        """Whether the fused step cannot do it."""
        return self.neighbours or self.temporal or self.recheck > 0


@dataclass
class Shown:
    """For the T queries of a call."""

    forced: Forced
    budgets: NDArray[np.int64]
    """How many entries the indexer chooses, [T]."""
    rules: Rules
    memory: Guard
    picked: list[Tensor] = field(default_factory=list)
    """The indexers' own choices in the layers so far, int64 [1, T, k]; by the layer code."""

    @property
    def entries(self) -> Tensor:
        """int64 [T, F]."""
        return torch.from_numpy(np.ascontiguousarray(self.forced.entries))


class Guard:
    """The guard of one sequence. `cfg`: the model's; `roles` uint8 [vocabulary]: see `ops/forced_entries.py`."""

    def __init__(
        self, cfg: ModelConfig, rules: Rules, roles: NDArray[np.uint8], pins: Sequence[tuple[int, int]] = ()
    ) -> None:
        ratios = {spec.compress_ratio for spec in cfg.layers if spec.has_indexer}
        if ratios != {rules.policy.ratio}:
            raise ConfigError(
                f"The guard's entries have {rules.policy.ratio} tokens, and this model's indexed layers have "
                f"{', '.join(map(str, sorted(ratios))) or 'none: it has no indexer'}. A guard needs one kind of them."
            )
        self.cfg, self.rules, self.roles, self.pins = cfg, rules, roles, tuple(pins)
        self.grams = Grams(rules.policy.ratio, roles)
        self.recent: dict[int, dict[str, set[int]]] = {}
        """T: by place of a query and layer, what it picked."""
        self.counts = [0] * len(KINDS)
        """Entries forced so far, by kind."""
        self.added = self.queries = self.rechecked = 0
        """Entries that queries read beyond k, queries with a choice, and those that read everything."""

    def anew(self) -> Guard:
        """One for another text."""
        return Guard(self.cfg, self.rules, self.roles, self.pins)

    def copy(self) -> Guard:
        """One that goes on by itself."""
        other = Guard.__new__(Guard)
        other.__dict__.update(vars(self))
        other.grams, other.counts = self.grams.copy(), list(self.counts)
        other.recent = {place: dict(picks) for place, picks in self.recent.items()}
        return other

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.grams.nbytes

    def most_bytes(self, num_tokens: int) -> int:
        """Most bytes held after so many tokens."""
        return Grams.most_bytes(num_tokens, self.rules.policy)

    def shown(self, tokens: Tensor, start: int, ids: Sequence[int]) -> Shown:
        """What the queries of `ids` must be shown, which follow the first `start` of `tokens`."""
        grams = self.grams
        if grams.length > start:
            grams.cut(start)
        elif grams.length < start:
            grams.add(tokens[grams.length : start].numpy())
        if len(ids) == 1 and not self.rules.extra:
            forced = grams.force_next(int(ids[0]), self.rules.policy, self.pins)
            budgets = _plain(self.cfg.index_topk, 1)
            self._count(start, forced, budgets)
            return Shown(forced, budgets, self.rules, self)
        grams.add(ids)
        forced = grams.force(self.rules.policy, start, self.pins)
        budgets = budgets_of(self.cfg, self.rules, start, len(ids))
        self._count(start, forced, budgets)
        return Shown(forced, budgets, self.rules, self)

    def _count(self, start: int, forced: Forced, budgets: NDArray[np.int64]) -> None:
        """Of queries that have a choice; at most, as the indexer may pick what is forced too."""
        if len(budgets) == 1:
            k = int(budgets[0])
            if (start + 1) // self.rules.policy.ratio > k:
                anchors, pinned, lexical = forced.kinds[0].tolist()
                counts = self.counts
                counts[0] += anchors
                counts[1] += pinned
                counts[2] += lexical
                self.added += anchors + pinned + lexical + k - self.cfg.index_topk
                self.queries += 1
            return
        first = max(0, int(budgets[-1] + 1) * self.rules.policy.ratio - 1 - start)  # the first one with a choice
        if first < len(budgets):
            kinds, budgets = forced.kinds[first:], budgets[first:]
            self.counts = [a + b for a, b in zip(self.counts, kinds.sum(0).tolist(), strict=True)]
            self.added += int(kinds.sum() + budgets.sum()) - self.cfg.index_topk * len(budgets)
            self.queries += len(budgets)


@lru_cache(maxsize=64)
def _plain(k: int, count: int) -> NDArray[np.int64]:
    return np.full(count, k, np.int64)


def budgets_of(cfg: ModelConfig, rules: Rules, start: int, count: int) -> NDArray[np.int64]:
    """How many entries the indexer chooses for queries [start, start + count): the budget law, in steps of `STEP`."""
    k = cfg.index_topk
    if not rules.extra:
        return _plain(k, count)
    seen = np.arange(start + 1, start + count + 1) // rules.policy.ratio
    key, entry = row_bytes(cfg)
    allowed = rules.extra * (seen * key + (np.minimum(k, seen) + cfg.sliding_window) * entry) - seen * key
    more = allowed // entry - cfg.sliding_window - k - rules.policy.width
    budgets = k + (np.maximum(more, 0) // STEP * STEP).astype(np.int64)
    return np.where(seen <= 2 * k, 2 * k, budgets)


def row_bytes(cfg: ModelConfig) -> tuple[int, int]:
    """Bytes of an index key and of an entry as the released engines keep them: FP4 keys, FP8 entries with bf16 rope."""
    return index_key_bytes(cfg.index_head_dim), entry_bytes(cfg.head_dim - cfg.qk_rope_head_dim, cfg.qk_rope_head_dim)


def bytes_factor(cfg: ModelConfig, length: int, added: float) -> float:
    """The bytes of a CSA layer's step with `added` more entries, over those without, at `length` tokens."""
    seen = length // 4
    key, entry = row_bytes(cfg)
    plain = seen * key + (min(cfg.index_topk, seen) + cfg.sliding_window) * entry
    return 1.0 + min(added, max(0, seen - cfg.index_topk)) * entry / plain if plain else 1.0


def forced_columns(shown: Sequence[Shown | None], counts: Sequence[int], num_rows: int) -> list[int]:
    """What the fused step reads of guards: of each row address and number of forced entries, and the budget."""
    if not any(shown):
        return [0] * (3 * num_rows)
    places, sizes, budgets = list[int](), list[int](), list[int]()
    for one, count in zip(shown, counts, strict=True):
        if one is None:
            places += [0] * count
            sizes += [0] * count
            budgets += [0] * count
            continue
        begin, step = one.forced.address, one.forced.entries.strides[0]
        places += range(begin, begin + count * step, step)
        sizes += one.forced.sizes.tolist()
        budgets += one.budgets.tolist()
    return places + sizes + budgets
