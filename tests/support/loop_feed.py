"""A feed of one short text that repeats: something that a tiny model learns in ten steps, in any process."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rorqual.train.feed import Continuation, Rows

VOCAB = 64
TEXT = torch.randint(0, VOCAB, (97,), generator=torch.Generator().manual_seed(5))


class LoopFeed:
    """Rows cut from the text, moving on with every step."""

    def __init__(self) -> None:
        self.position = 0

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        starts = (torch.arange(num_rows) * 31 + self.position * 17) % len(TEXT)
        self.position += 1
        tokens = TEXT[(starts[:, None] + torch.arange(seq_len)) % len(TEXT)]
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        return Rows(tokens, labels, torch.zeros_like(tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def token_counts(self) -> Tensor:
        return torch.bincount(TEXT, minlength=VOCAB).double() + 1

    def token_byte_lengths(self) -> Tensor | None:
        return None

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        yield "loop", LoopFeed().next_rows(num_tokens // seq_len, seq_len)

    def continuation(self, text: str) -> Continuation | None:
        return Continuation(TEXT[:4].tolist(), str, VOCAB)

    def save_artifacts(self, folder: str) -> None:
        pass


def make_feed(*_: Any) -> LoopFeed:
    return LoopFeed()
