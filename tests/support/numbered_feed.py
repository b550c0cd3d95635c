"""What the small feeds of the tests share: batches that are a function of their number, of a few distinct tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.train.feed import Continuation, Rows


class NumberedFeed(ABC):
    """A feed whose position is the number of the next batch. Ids below `DISTINCT` occur, each stands for two bytes."""

    VOCAB = 48
    DISTINCT = 6
    HELD_OUT = "invented"

    def __init__(self) -> None:
        self.position = 0

    @abstractmethod
    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        """The batch at the position, which moves on by one."""

    def draw(self, num_rows: int, seq_len: int) -> Tensor:
        """Tokens of the batch at the position, in runs of four: something that a model learns in a few steps."""
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        tokens = torch.randint(0, self.DISTINCT, (num_rows, seq_len // 4), generator=generator)
        return tokens.repeat_interleave(4, dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def token_counts(self) -> Tensor:
        return torch.ones(self.VOCAB)

    def token_byte_lengths(self) -> Tensor | None:
        return torch.full((self.VOCAB,), 2)

    def token_compression(self) -> Tensor:
        return torch.arange(self.VOCAB)

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        yield self.HELD_OUT, type(self)().next_rows(num_tokens // seq_len, seq_len)

    def continuation(self, text: str) -> Continuation | None:
        return Continuation([1, 2], str, self.DISTINCT)

    def save_artifacts(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def one_document(tokens: Tensor) -> Rows:
    """Rows of one document each, [B, S], whose every token but the first is to be learned."""
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    return Rows(tokens, labels, torch.zeros_like(tokens))
