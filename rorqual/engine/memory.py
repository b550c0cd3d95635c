"""What a sequence's state costs, from the number of its tokens: what a budget of bytes is shared out by."""

from __future__ import annotations

from typing import Any

import torch

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model.cache_format import row_of


class StateCost:
    """Most bytes that a new state of `model` holds after so many tokens, whatever chunks they came in.

    Rings are of fixed size; entries, index keys and token ids double their room when it runs out (`LayerState.append`),
    so up to twice what is stored. Raises: ConfigError for a model whose states do not tell their size.
    """

    def __init__(self, model: Any) -> None:  # Any: a LanguageModel with Transformer's configuration and states
        try:
            empty = model.new_state(1)
            self._fixed = int(empty.nbytes()["total"])
            cfg, dtype = model.cfg, model.reference.dtype
            self._rows = [
                (spec.compress_ratio, _row_bytes(cfg, "entries", dtype)
                 + (_row_bytes(cfg, "index_keys", dtype) if spec.has_indexer else 0))
                for spec in cfg.layers
                if spec.compress_ratio
            ]  # fmt: skip
        except AttributeError as error:
            raise ConfigError(
                f"max_state_bytes was given, but the states of {type(model).__name__} do not tell their size "
                f"({error}). Use a rorqual.Transformer, or leave the limit out."
            ) from None

    def __call__(self, num_tokens: int) -> int:
        total = self._fixed + 4 * max(64, 2 * num_tokens)  # ids are int32
        for ratio, row_bytes in self._rows:
            if entries := num_tokens // ratio:
                total += row_bytes * max(16, 2 * entries)
        return total


def _row_bytes(cfg: ModelConfig, part: str, dtype: torch.dtype) -> int:
    width, kind = row_of(cfg, part, dtype)
    return width * kind.itemsize
