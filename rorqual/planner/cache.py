"""What a sequence keeps in memory, in bytes, by part and number of tokens.

Each layer keeps a ring of recent keys (window), compressor projections of the open block (pending) and, one row a block
of m tokens, compressed entries and index keys:

    window       layers x slots x row
    pending      2 (value, score) x slots x channels x 4, for the compressor and for the indexer's
    entries      floor(tokens / m) x row
    index keys   floor(tokens / 4) x row, in CSA layers

The parts are the same everywhere; rows and slots depend on who keeps them:

    released     as V4 is served: window and entries 584 bytes a row, index keys 68, a ring of W slots, no way back
    Rorqual      rows as `model/cache_format.py` says (584 and 68, or numbers in the model's dtype), windows in the
                 model's dtype, and rings longer by `rewind` tokens so that a state can be cut back

Source: V4 report (heterogeneous cache); `model/layer_state.py`. Left out: token ids, and what an MTP module keeps.
"""

from dataclasses import dataclass

import torch

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.cache_format import row_of
from rorqual.model.pages import page_parts, tokens_per_page
from rorqual.ops.cache_codec import entry_bytes, index_key_bytes


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence, by part; the names are those of `State.nbytes`."""

    window: int
    entries: int
    index_keys: int
    pending: int
    engram: int = 0

    @property
    def fixed(self) -> int:
        """What does not grow with the sequence."""
        return self.window + self.pending + self.engram

    @property
    def growing(self) -> int:
        """What does."""
        return self.entries + self.index_keys

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.growing


@dataclass(frozen=True)
class CacheRows:
    """How a cache is kept: bytes a row, and how long rings are."""

    window: int
    entry: int
    index_key: int
    number: int
    """Bytes of a number that is not packed."""
    rewind: int
    """Tokens that a state can be cut back."""
    has_own_slot: bool
    """Rings have a slot for the newest token too, as in the released code; Rorqual's hold what comes before it."""

    def sequence(self, config: ModelConfig, num_tokens: int) -> CacheBytes:
        """Bytes of a sequence of so many tokens, without room for more."""
        compressed = [spec for spec in config.layers if spec.compress_ratio]
        window_slots = max(1, config.sliding_window - (not self.has_own_slot)) + self.rewind
        return CacheBytes(
            window=config.num_hidden_layers * window_slots * self.window,
            entries=sum(num_tokens // spec.compress_ratio * self.entry for spec in compressed),
            index_keys=sum(
                num_tokens // spec.compress_ratio * self.index_key for spec in compressed if spec.has_indexer
            ),
            pending=sum(self._pending(config, spec) for spec in compressed),
            engram=self._engram(config),
        )

    def growing(self, config: ModelConfig) -> list[tuple[int, int]]:
        """What grows: for each layer that compresses, tokens a row and bytes a row (entry and index key)."""
        return [
            (spec.compress_ratio, self.entry + (self.index_key if spec.has_indexer else 0))
            for spec in config.layers
            if spec.compress_ratio
        ]

    def bytes_per_token(self, config: ModelConfig) -> float:
        """What each further token adds, on average."""
        return sum(nbytes / ratio for ratio, nbytes in self.growing(config))

    def read(self, config: ModelConfig, num_tokens: int) -> int:
        """Bytes that generating one token reads: the window, all index keys, and picked (CSA) or all (HCA) entries."""
        rows = config.num_hidden_layers * min(num_tokens, config.sliding_window) * self.window
        for spec in config.layers:
            if spec.compress_ratio:
                count = num_tokens // spec.compress_ratio
                rows += (min(count, config.index_topk) if spec.has_indexer else count) * self.entry
                rows += count * self.index_key if spec.has_indexer else 0
        return rows

    def _pending(self, config: ModelConfig, spec: LayerSpec) -> int:
        ratio, blocks = spec.compress_ratio, 2 if spec.overlap else 1
        slots = ratio * blocks - (not self.has_own_slot) + self.rewind
        width = config.head_dim + (config.index_head_dim if spec.has_indexer else 0)
        return 2 * slots * blocks * width * 4

    def _engram(self, config: ModelConfig) -> int:
        memory = config.engram
        if memory is None:
            return 0
        looks_back = (max(1, memory.max_order - 1) + self.rewind) * 8
        if memory.reach:
            looks_back += (memory.reach + self.rewind) * (config.hidden_size * self.number + config.hc_mult * 4)
        return looks_back * sum(spec.engram for spec in config.layers)


def released_rows(config: ModelConfig) -> CacheRows:
    """The released system's cache, whose rings also hold packed rows."""
    entry = entry_bytes(config.nope_head_dim, config.qk_rope_head_dim)
    return CacheRows(entry, entry, index_key_bytes(config.index_head_dim), number=2, rewind=0, has_own_slot=True)


def own_rows(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, rewind: int = 128) -> CacheRows:
    """What a state of Rorqual's keeps under the configuration's `cache_format`, for a model in `dtype`."""
    entry, key = (
        width * kind.itemsize for width, kind in (row_of(config, p, dtype) for p in ("entries", "index_keys"))
    )
    return CacheRows(config.head_dim * dtype.itemsize, entry, key, dtype.itemsize, rewind, has_own_slot=False)


def paged_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Entries and index keys of a sequence in whole pages, as a prefix cache holds them."""
    page = sum(part.nbytes for part in page_parts(config, dtype))
    return -(-num_tokens // tokens_per_page(config)) * page
