"""A feed of one short text that repeats: something that a tiny model learns in ten steps, in any process."""

from typing import Any

import torch
from numbered_feed import NumberedFeed, one_document
from torch import Tensor

from rorqual.train.feed import Continuation, Rows

TEXT = torch.randint(0, 64, (97,), generator=torch.Generator().manual_seed(5))


class LoopFeed(NumberedFeed):
    """Rows cut from the text, moving on with every step."""

    VOCAB = 64
    HELD_OUT = "loop"

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        starts = (torch.arange(num_rows) * 31 + self.position * 17) % len(TEXT)
        self.position += 1
        return one_document(TEXT[(starts[:, None] + torch.arange(seq_len)) % len(TEXT)])

    def token_counts(self) -> Tensor:
        return torch.bincount(TEXT, minlength=self.VOCAB).double() + 1

    def token_byte_lengths(self) -> Tensor | None:
        return None

    def continuation(self, text: str) -> Continuation | None:
        return Continuation(TEXT[:4].tolist(), str, self.VOCAB)


def make_feed(*_: Any) -> LoopFeed:
    return LoopFeed()
