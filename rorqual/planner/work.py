"""What one token costs a network in operations and bytes: the facts that bounds and comparisons are made of.

Operations are kept by part and by the number format that their products run in, since a chip's rate depends on it:

    linear    2 for every weight of a matrix that works on the token: fp8 where it is stored in FP8 or FP4 (FP4 weights
              meet FP8 inputs), else bf16
    head      the same for the head, bf16
    core      4 H c for every key that a query reads, bf16
    index     2 J c' for every index key that an indexer scores, fp4 (bf16 where index keys are not packed)
    mixing    the residual streams (mHC) with their projections, bf16

H heads, c head width, J index heads, c' their width. Source: V4 report, efficiency; architecture of V4 as in `model/`.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from rorqual.config import ModelConfig
from rorqual.planner.cache import CacheRows, released_rows
from rorqual.planner.flops import attention_keys, mean_entries, mixing_flops, per_key_flops
from rorqual.planner.tensors import Inventory, inventory

NumberFormat = Literal["fp4", "fp8", "bf16"]
PACKED_DTYPES = ("I8", "F8_E4M3")
_LOOKED_UP = ("embedding", "engram_tables", "hash_tables")
_NO_PRODUCT = (*_LOOKED_UP, "mtp")
_MIXING = ("hyper_connections", "norms_hc_head")


@dataclass(frozen=True)
class Operations:
    """Operations of one part for one token."""

    part: str
    number: NumberFormat
    flops: float


@dataclass(frozen=True)
class Work:
    """Operations of one token, by part."""

    parts: tuple[Operations, ...]

    def __iter__(self) -> Iterator[Operations]:
        return iter(self.parts)

    @property
    def flops(self) -> float:
        """All operations, each counted once."""
        return sum(part.flops for part in self.parts)

    def without(self, part: str) -> "Work":
        """The rest, without one part."""
        return Work(tuple(each for each in self.parts if each.part != part))

    def in_format(self, number: NumberFormat) -> float:
        """Operations whose products run in this format."""
        return sum(part.flops for part in self.parts if part.number == number)


@dataclass(frozen=True)
class WeightBytes:
    """Stored bytes of a network's weights, by how often they are read."""

    always: int
    """Read for every step: everything not named below."""
    routed: int
    """Routed experts of all layers; a step reads those that its tokens choose."""
    lookup: int
    """Tables of which a token reads a row: embedding, hash routing, Engram."""
    drafting: int
    """MTP modules: kept, and read only when drafting."""

    @property
    def total(self) -> int:
        """What must be kept."""
        return self.always + self.routed + self.lookup + self.drafting


@dataclass(frozen=True)
class Experts:
    """The mixture of experts, as far as bytes and traffic depend on it."""

    layers: int
    count: int
    chosen: int
    hidden_size: int
    width: int

    def read_share(self, num_tokens: int) -> float:
        """Expected share of the routed weights that so many tokens read, when each chooses evenly by itself."""
        return 1 - (1 - self.chosen / self.count) ** num_tokens


class Network(Protocol):
    """A network to plan for: V4 in any configuration, or one to compare it with (`baselines.py`)."""

    name: str
    weights: WeightBytes
    experts: Experts

    def decode(self, context: int) -> Work:
        """The newest of `context` tokens."""

    def prefill(self, num_tokens: int) -> Work:
        """Mean over the tokens of a prompt of so many, without the head, which only the last of them needs."""

    def cache_bytes(self, context: int) -> int:
        """What a sequence keeps."""

    def cache_read(self, context: int) -> int:
        """What generating one token reads of it."""

    def cache_per_token(self) -> float:
        """What a further token adds, on average."""


class V4:
    """A V4 network, whose weights are counted from the list of its stored tensors."""

    def __init__(self, config: ModelConfig, name: str, stored: Inventory | None = None, rows: CacheRows | None = None):
        """`stored`: how weights are stored (the released format); `rows`: how the cache is kept (the released one)."""
        self.config, self.name = config, name
        self.stored = inventory(config, "official") if stored is None else stored
        self.rows = released_rows(config) if rows is None else rows
        self.experts, self.weights = experts_of(config), weight_bytes(self.stored)
        self._products = count_products(self.stored, config)

    def decode(self, context: int) -> Work:
        """See `Network`."""
        keys = scored = 0
        for spec in self.config.layers:
            keys += min(context, self.config.sliding_window)
            if spec.compress_ratio:
                entries = context // spec.compress_ratio
                keys += min(entries, self.config.index_topk) if spec.has_indexer else entries
                scored += entries if spec.has_indexer else 0
        return self._work(keys, scored)

    def prefill(self, num_tokens: int) -> Work:
        """See `Network`."""
        keys = sum(attention_keys(self.config, spec, num_tokens) for spec in self.config.layers)
        ratios = [spec.compress_ratio for spec in self.config.layers if spec.has_indexer]
        scored = sum(mean_entries(num_tokens, ratio, num_tokens) for ratio in ratios)
        return self._work(keys, scored).without("head")

    def cache_bytes(self, context: int) -> int:
        """See `Network`."""
        return self.rows.sequence(self.config, context).total

    def cache_read(self, context: int) -> int:
        """See `Network`."""
        return self.rows.read(self.config, context)

    def cache_per_token(self) -> float:
        """See `Network`."""
        return self.rows.bytes_per_token(self.config)

    def _work(self, keys: float, scored: float) -> Work:
        cfg = self.config
        index = 2.0 * cfg.index_n_heads * cfg.index_head_dim * scored
        return Work(
            (
                *self._products,
                Operations("core", "bf16", per_key_flops(cfg) * keys),
                Operations("index", "fp4" if self.rows.index_key < cfg.index_head_dim else "bf16", index),
            )
        )


def count_products(stored: Inventory, config: ModelConfig, left_out: Collection[str] = ()) -> tuple[Operations, ...]:
    """Operations of the matrices that work on one token, by part and format; without some components."""
    found: Counter[tuple[str, NumberFormat, bool]] = Counter()
    for tensor in stored.tensors:
        is_matrix = len(tensor.shape) == 2 and not tensor.name.endswith((".scale", ".ape"))
        if is_matrix and tensor.component not in (*_NO_PRODUCT, *left_out):
            part = "head" if tensor.component == "head" else "mixing" if tensor.component in _MIXING else "linear"
            number: NumberFormat = "fp8" if tensor.dtype in PACKED_DTYPES else "bf16"
            is_routed = tensor.component == "routed_experts"
            found[part, number, is_routed] += tensor.elements * (2 if tensor.dtype == "I8" else 1)
    flops: dict[tuple[str, NumberFormat], float] = {("mixing", "bf16"): mixing_flops(config)}
    for (part, number, is_routed), weights in found.items():
        active = weights * config.num_experts_per_tok // config.n_routed_experts if is_routed else weights
        flops[part, number] = flops.get((part, number), 0.0) + 2.0 * active
    return tuple(Operations(part, number, count) for (part, number), count in flops.items())


def weight_bytes(stored: Inventory, left_out: Collection[str] = ()) -> WeightBytes:
    """Bytes of stored weights by how often they are read; without some components."""
    parts = {name: nbytes for name, (_, nbytes) in stored.by_component.items() if name not in left_out}
    routed, drafting = parts.pop("routed_experts", 0), parts.pop("mtp", 0)
    lookup = sum(parts.pop(name, 0) for name in _LOOKED_UP)
    return WeightBytes(sum(parts.values()), routed, lookup, drafting)


def experts_of(config: ModelConfig) -> Experts:
    """The mixture of experts of a V4 network."""
    c = config
    return Experts(
        c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size
    )
