"""What the engine needs of a model and of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class LanguageModel(Protocol):
    """What the engine needs of a model; `rorqual.Transformer` has it. Tokens [1, S] give logits [1, S, V].

    With a method `next_scores`, as Transformer's, requests share steps; without it each makes its own.
    """

    @property
    def cfg(self) -> Any: ...  # needs `vocab_size` and `max_position_embeddings`
    def parameters(self) -> Iterator[Any]: ...
    def new_state(self, batch_size: int = 1) -> Any: ...
    def forward_streams(self, tokens: Tensor, *, state: Any) -> Tensor: ...
    def final_hidden(self, streams: Tensor) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class TextTokenizer(Protocol):
    """What the engine needs of a tokenizer; `rorqual.tokenizer.Tokenizer` has it."""

    @property
    def eos_token_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def control_token_ids(self) -> frozenset[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def stream_decoder(self) -> Any: ...
