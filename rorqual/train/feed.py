"""What the training loop needs from data, whatever it is made of.

The real one (`corpus_feed.py`) stands on `rorqual.data`; tests use small ones. A feed is a pure function of
its settings and its position, and its position is a few plain values, so a resumed run reads exactly what it
would have read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    experts: Mapping[str, Tensor] | None = None
    """Experts that learned routers must use, [B, S, A] by the router's module path; None where they select."""

    def part(self, start: int, stop: int) -> "Rows":
        """Rows `start` to `stop`."""
        segments = None if self.segment_ids is None else self.segment_ids[start:stop]
        lengths = None if self.lengths is None else self.lengths[start:stop]
        if lengths is not None and all(length == self.tokens.shape[1] for length in lengths):
            lengths = None
        experts = None if self.experts is None else {name: ids[start:stop] for name, ids in self.experts.items()}
        return Rows(self.tokens[start:stop], self.labels[start:stop], segments, lengths, experts)

    def filled(self, count: int) -> "Rows":
        """`count` rows: these, and behind them rows of padding, which add to no loss and no count."""
        missing, seq_len = count - self.tokens.shape[0], self.tokens.shape[1]
        if not missing:
            return self

        def more(x: Tensor, value: Tensor | int) -> Tensor:
            blank = torch.zeros(missing, *x.shape[1:], dtype=x.dtype, device=x.device)
            return torch.cat([x, blank + value])

        own = torch.arange(seq_len, device=self.tokens.device)  # a segment of its own a token
        return Rows(
            more(self.tokens, 0),
            more(self.labels, -100),
            None if self.segment_ids is None else more(self.segment_ids, own.to(self.segment_ids.dtype)),
            (*(self.lengths or [seq_len] * self.tokens.shape[0]), *[0] * missing),
        )

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return Rows(self.tokens.to(device), self.labels.to(device), segments, self.lengths, self.experts)


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

    def token_compression(self) -> Tensor:
        """Compressed id of each token id, int64 [V]: spellings that Engram's hashes shall not tell apart share one."""

    def held_out(self, num_tokens: int, seq_len: int) -> Iterator[tuple[str, Rows]]:
        """Named groups of held-out rows (about `num_tokens` tokens a group), the same at every call."""

    def continuation(self, text: str) -> Continuation | None:
        """A sample prompt ready to be continued, or None where tokens are not text."""

    def save_artifacts(self, folder: str) -> None:
        """Write what must travel with the model (tokenizer.json, world.json) into its folder."""
