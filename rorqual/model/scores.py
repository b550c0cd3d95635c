"""What a step of several sequences came to: the streams of its tokens, and the scores behind some of them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rorqual.errors import RequestError


class Scores(NamedTuple):
    """T tokens in all, scores behind W of them; N streams, D hidden, C tokens that were scored."""

    streams: Tensor
    """After the last layer, [1, T, N, D]."""
    hidden: Tensor
    """Before the output head, [1, W, D]."""
    logits: Tensor
    """fp32 [1, W, C]."""
    best: list[int]
    """The first of each row's largest logits; a NaN counts as the largest."""


def best_of(logits: Tensor) -> list[int]:
    """`Scores.best` of logits [1, W, C]."""
    best: list[int] = logits[0].detach().cpu().numpy().argmax(-1).tolist()  # numpy promises the first among equals
    return best


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
