"""What a step of several sequences came to: the streams of its tokens, and the scores behind some of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import RequestError


@dataclass(frozen=True)
class Scores:
    """T tokens in all, scores behind W of them; N streams, D hidden, C tokens that were scored."""

    streams: Tensor
    """After the last layer, [1, T, N, D]."""
    hidden: Tensor
    """Before the output head, [1, W, D]."""
    logits: Tensor
    """fp32 [1, W, C]."""
    best: Tensor
    """The first of each row's largest logits, int64 [W] in memory of the CPU; a NaN counts as the largest."""


def best_of(logits: Tensor) -> Tensor:
    """`Scores.best` of logits [..., W, C]."""
    return torch.from_numpy(logits.detach().cpu().numpy().argmax(-1)).flatten()  # numpy promises the first of equals


def check_wanted(wanted: Sequence[int], num_tokens: int, choices: int, vocab_size: int) -> None:
    """Raises RequestError for places that are no tokens of the step, or ids that the head does not have."""
    if len(wanted) > num_tokens or not all(0 <= place < num_tokens for place in wanted):
        raise RequestError(
            f"Scores behind the tokens {list(wanted)} were asked for, but the step has {num_tokens}. Give "
            "places from 0 in the row of all segments' tokens, each once."
        )
    if not 1 <= choices <= vocab_size:
        raise RequestError(
            f"{choices} ids were to be scored, but the vocabulary has {vocab_size}. Give 1 to that many."
        )
