"""From logits to one token: pure functions, no hidden state.

Filters act in the order temperature, top-k, top-p, min-p, each on what the one before left (the order
transformers and vLLM use). Randomness is counter-based: the draw for a token depends on the request's seed
and on the token's position alone, so a request gives the same output alone, beside others, or resumed from
the middle.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.engine.params import SamplingParams
from rorqual.errors import RequestError
from rorqual.seeds import derive


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position`: 53 random bits, equal on every machine."""
    return (derive(seed, "sample", position) >> 10) / 2**53


def argmax(logits_V: Tensor) -> int:
    """Index of the largest value, the lowest index among equals (torch leaves that choice open)."""
    return int((logits_V == logits_V.max()).nonzero()[0, 0])


def filtered_probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution to draw from: float64 [V], zero where a filter removed the token, sum 1.

    Ties at the edge of top-k and top-p are kept lowest id first. Temperature must be above zero.
    """
    # Relative to the best, which stays exactly 0: at a minute temperature 1 / T overflows, and 0 * inf is NaN.
    below_V = logits_V.double() - logits_V.max()
    probs_V = torch.softmax(torch.where(below_V == 0, 0.0, below_V / params.temperature), dim=-1)
    if params.top_k is not None or params.top_p < 1:
        sorted_V, order_V = torch.sort(probs_V, descending=True, stable=True)
        if params.top_k is not None and params.top_k < len(sorted_V):
            sorted_V[params.top_k :] = 0
        if params.top_p < 1:
            # A token stays while the mass before it has not reached top_p; the first one always stays.
            before_V = torch.cumsum(sorted_V, dim=-1) - sorted_V
            sorted_V[before_V >= params.top_p * sorted_V.sum()] = 0
        probs_V = torch.zeros_like(probs_V).scatter_(0, order_V, sorted_V)
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


def sample(logits_V: Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """Choose the token at `position`.

    Shapes: logits [V], any float type. Raises: RequestError (500) when the model gave no usable distribution.
    """
    logits_V = logits_V.float()
    if params.suppress_token_ids:
        logits_V = logits_V.clone()
        logits_V.index_fill_(0, params.suppress_index, float("-inf"))
    best = float(logits_V.max())  # max() passes NaN on, so one look finds it
    if best != best or best in (float("inf"), float("-inf")):
        raise RequestError(
            f"The model's scores at position {position} hold {best}, so no token can be chosen. The weights "
            "or the arithmetic are damaged; check the checkpoint (rorqual inspect) and the dtype.",
            status=500,
            type="server_error",
        )
    if params.temperature == 0:
        return argmax(logits_V)
    return pick(filtered_probabilities(logits_V, params), uniform(seed, position))


def log_probabilities(logits: Tensor) -> Tensor:
    """Natural log probabilities of the model itself, before temperature and filters; same shape, float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def best_tokens(logprobs_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens as (id, log probability), best first, lowest id first among equals."""
    if count == 0:
        return ()
    values_V, order_V = torch.sort(logprobs_V, descending=True, stable=True)
    return tuple(zip(order_V[:count].tolist(), values_V[:count].tolist(), strict=True))
