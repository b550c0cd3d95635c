"""From logits to one token: pure functions, no hidden state.

Filters act in the order temperature, top-k, top-p, min-p, each on what the one before left (the order
transformers and vLLM use). Randomness is counter-based: the draw for a token depends on the request's seed
and on the token's position alone, so a request gives the same output alone, beside others, or resumed from
the middle.

Greedy choices are made for all rows of a step at once; draws row by row, since the order in which torch adds up a row
may depend on how many rows there are.

Legend: `V` vocabulary, `R` requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.params import SamplingParams
from rorqual.errors import RequestError
from rorqual.seeds import derive

SHORTLISTS = (1024, 16384)
"""How many of the likeliest tokens top-p looks at first, and next where they do not reach its mass; then at all."""


@dataclass(frozen=True)
class Choice:
    """What a row of scores is chosen by."""

    params: SamplingParams
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position`: 53 random bits, equal on every machine."""
    return (derive(seed, "sample", position) >> 10) / 2**53


def filtered_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution to draw from: float64 [V], zero where a filter removed the token, sum 1.

    Ties at the edge of top-k and top-p are kept lowest id first. Temperature must be above zero.
    """
    # Relative to the best, which stays exactly 0: at a minute temperature 1 / T overflows, and 0 * inf is NaN.
    below_V = logits_V.double() - logits_V.max()
    probs_V = torch.softmax(torch.where(below_V == 0, 0.0, below_V / params.temperature), dim=-1)
    if params.top_k is not None or params.top_p < 1:
        sorted_C, ids_C = _likeliest(probs_V, params)
        if params.top_k is not None:
            sorted_C, ids_C = sorted_C[: params.top_k], ids_C[: params.top_k]
        if params.top_p < 1:
            # A token stays while the mass before it has not reached top_p; the first one always stays.
            total = sorted_C.sum() if params.top_k is not None else probs_V.sum()
            before_C = torch.cumsum(sorted_C, dim=-1) - sorted_C
            sorted_C = torch.where(before_C < params.top_p * total, sorted_C, 0.0)
        probs_V = torch.zeros_like(probs_V).scatter_(0, ids_C, sorted_C)
    if params.min_p > 0:
        probs_V = torch.where(probs_V >= params.min_p * probs_V.max(), probs_V, 0.0)
    return probs_V / probs_V.sum()


def pick(probs_V: Tensor, draw: float) -> int:
    """Invert the cumulative distribution at `draw` in [0, 1); never returns a token of probability zero."""
    cumulative_V = torch.cumsum(probs_V, dim=-1)
    index = int(torch.searchsorted(cumulative_V, draw * float(cumulative_V[-1]), right=True))
    if index >= len(probs_V) or probs_V[index] == 0:  # the product rounded up to the total
        index = int(probs_V.nonzero()[-1, 0])
    return index


def _likeliest(probs_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The first of all tokens sorted by probability, lowest id first among equals: as many as top-k or top-p can keep.

    Sorting a few of 130,000 is ten times cheaper than sorting all.
    """
    for count in SHORTLISTS if params.top_k is None else (params.top_k,):
        if count >= len(probs_V):
            break
        least = torch.topk(probs_V, count, sorted=False).values.min()
        ids_C = (probs_V >= least).nonzero()[:, 0]  # by id, and with all that equal the last
        values_C, order_C = torch.sort(probs_V[ids_C], descending=True, stable=True)
        if params.top_k is not None or values_C.sum() > params.top_p * probs_V.sum():
            return values_C, ids_C[order_C]
    return torch.sort(probs_V, descending=True, stable=True)


def choose(
    logits_RV: Tensor, choices: Sequence[Choice], best_R: Sequence[int] | None = None
) -> list[int | RequestError]:
    """A token for each row, or why there can be none; a row's result does not depend on the others.

    best_R: where they are known, the likeliest tokens: the first among equals, and a NaN before all.
    Shapes: logits [R, V], any float type.
    """
    is_own = False
    known_R: list[int | None] = [None] * len(choices) if best_R is None else [*best_R]
    for row, choice in enumerate(choices):
        params = choice.params
        # a greedy row's likeliest token, if it is not suppressed, is the likeliest of those that are not
        if params.suppressed and (params.temperature > 0 or known_R[row] is None or known_R[row] in params.suppressed):
            if not is_own:
                logits_RV, is_own = logits_RV.float().clone(), True
            logits_RV[row].index_fill_(0, params.suppress_index.to(logits_RV.device), float("-inf"))
            known_R[row] = None
    scores_RV = logits_RV.detach().float().cpu().numpy()
    # numpy promises the first among equals, and takes NaN for the largest
    best_R = [int(scores_RV[row].argmax()) if best is None else best for row, best in enumerate(known_R)]
    out: list[int | RequestError] = []
    for row, (choice, best) in enumerate(zip(choices, best_R, strict=True)):
        score = float(scores_RV[row, best])
        if not math.isfinite(score):
            out.append(_damaged(score, choice.position))
        elif choice.params.temperature == 0:
            out.append(best)
        else:
            probs_V = filtered_probabilities(logits_RV[row], choice.params)
            out.append(pick(probs_V, uniform(choice.seed, choice.position)))
    return out


def sample(logits_V: Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """Choose the token at `position`.

    Shapes: logits [V], any float type. Raises: RequestError (500) when the model gave no usable distribution.
    """
    [token] = choose(logits_V.unsqueeze(0), [Choice(params, seed, position)])
    if isinstance(token, RequestError):
        raise token
    return token


def _damaged(best: float, position: int) -> RequestError:
    return RequestError(
        f"The model's scores at position {position} hold {best}, so no token can be chosen. The weights "
        "or the arithmetic are damaged; check the checkpoint (rorqual inspect) and the dtype.",
        status=500,
        type="server_error",
    )


def log_probabilities(logits: Tensor) -> Tensor:
    """Natural log probabilities of the model itself, before temperature and filters; same shape, float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def best_tokens(logprobs_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens as (id, log probability), best first, lowest id first among equals."""
    if count == 0:
        return ()
    values_V, order_V = torch.sort(logprobs_V, descending=True, stable=True)
    return tuple(zip(order_V[:count].tolist(), values_V[:count].tolist(), strict=True))
