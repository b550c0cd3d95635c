"""What the training loop needs from data, whatever it is made of.

The real one (`corpus_feed.py`) stands on `rorqual.data`; tests use small ones. A feed is a pure function of
its settings and its position, and its position is a few plain values, so a resumed run reads exactly what it
would have read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Packed rows, all [B, S].

    `tokens` int64; `labels` int64, the next token of the same document where it is to be learned, else -100;
    `segment_ids` int, one number per document of a row, or None where every row is one document. `lengths`:
    tokens of each row before the padding at its end, or None where no row has any; padding is not counted
    anywhere, and where there are `segment_ids` every padding token has one of its own.
    """

    tokens: Tensor
    labels: Tensor
    segment_ids: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def part(self, start: int, stop: int) -> "Rows":
        """Rows `start` to `stop`."""
        segments = None if self.segment_ids is None else self.segment_ids[start:stop]
        lengths = None if self.lengths is None else self.lengths[start:stop]
        if lengths is not None and min(lengths) == self.tokens.shape[1]:
            lengths = None
        return Rows(self.tokens[start:stop], self.labels[start:stop], segments, lengths)

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return Rows(self.tokens.to(device), self.labels.to(device), segments, self.lengths)


@dataclass(frozen=True)
class Continuation:
    """A sample prompt in ids, and what turns its continuation into text."""

    ids: Sequence[int]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    """Ids that stand for something; the model's vocabulary may be larger."""


class Feed(Protocol):
    """Training rows in order, held-out rows, and what is known about the tokens."""

    def next_rows(self, num_rows: int, seq_len: int) -> Rows:
        """The next rows. A change of `seq_len` goes on from the current position."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. Raises DataError when the data is not what it was."""

    def token_counts(self) -> Tensor:
        """How often each token occurs in (a sample of) the training data, [V]."""

    def token_byte_lengths(self) -> Tensor | None:
        """Bytes of text per token id, [V], or None where tokens are not text."""

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        """Named groups of held-out rows (about `num_tokens` tokens a group), the same at every call."""

    def continuation(self, text: str) -> Continuation | None:
        """A sample prompt ready to be continued, or None where tokens are not text."""

    def save_artifacts(self, folder: str) -> None:
        """Write what must travel with the model (tokenizer.json, world.json) into its folder."""
