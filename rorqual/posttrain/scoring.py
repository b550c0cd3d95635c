"""Log-probabilities of given tokens: the one place where trainers compute them.

They are those of the engine that sampled, up to the rounding of sums in another order: the same layers, the same head,
and, where asked for, the same temperature, the same truncated support ("Keep Sampling Mask") and the same experts
("Keep Routing"). Source: V4 report and V3.2 report, GRPO stability.

B rows, S tokens, V vocabulary, A active experts, K kept tokens. Position t is about token t + 1.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rorqual.errors import RequestError
from rorqual.model import Trace, Transformer

CHUNK = 1024
"""Tokens whose logits exist at once."""


class TokenScores(NamedTuple):
    """Of every token after the first of its row, fp32 [B, S - 1]; 0 where nothing is predicted."""

    logprobs: Tensor
    entropies: Tensor
    """Of the distribution that the token was drawn from, in nats, without gradient."""


def token_logprobs(
    model: Transformer,
    ids: Tensor,
    segment_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    sampling_mask: Tensor | None = None,
    routing: Mapping[str, Tensor] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    wanted: Tensor | None = None,
    trace: Trace | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Natural log-probability of ids[:, t + 1] given what stands before it: ids int64 [B, S] -> fp32 [B, S - 1].

    `segment_ids` [B, S]: packed documents that do not see each other; the first token of one has none before it and
    gets 0. `lengths`: tokens of each row before its right padding, which gets 0 too. `wanted` bool [B, S - 1]: where
    the numbers are needed (elsewhere 0), which saves the output head's work on prompts.
    `temperature` divides the logits: a number, or [B, S - 1] where rows differ. With 1 and no mask the values are what
    the engine reports as a token's log-probability.
    `sampling_mask`: the tokens that the sampler's filters had left, over which probabilities are renormalised: bool
    [B, S - 1, V], or ids int64 [B, S - 1, K] with -1 in empty places. A position where nothing is marked was not cut.
    `routing`: the experts that learned routers used, int [B, S, A] or [B, S - 1, A] by the router's module path (as
    `Trace(router_ids=True)` records them). `trace`: what else to record of the forward pass.
    Only `chunk` positions' logits exist at a time, in the backward pass too.
    Raises: RequestError for shapes that do not fit, a temperature of 0 or below, or a token that its mask excludes.
    """
    return token_scores(
        model, ids, segment_ids, temperature, sampling_mask, routing,
        lengths=lengths, wanted=wanted, trace=trace, chunk=chunk,
    ).logprobs  # fmt: skip


def token_scores(
    model: Transformer,
    ids: Tensor,
    segment_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    sampling_mask: Tensor | None = None,
    routing: Mapping[str, Tensor] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    wanted: Tensor | None = None,
    trace: Trace | None = None,
    chunk: int = CHUNK,
) -> TokenScores:
    """`token_logprobs` and the entropies of the same distributions. Arguments and errors are the same."""
    rows, length = ids.shape
    where = _predicted(ids, segment_ids, lengths)
    if wanted is not None:
        _check_shape("wanted", wanted, where.shape)
        where = where & wanted.to(where.device, torch.bool)
    divisor = _divisor(temperature, where)
    if sampling_mask is not None and (sampling_mask.ndim != 3 or sampling_mask.shape[:2] != where.shape):
        raise RequestError(
            f"sampling_mask has shape {tuple(sampling_mask.shape)} for ids {tuple(ids.shape)}; it is about the tokens "
            f"after the first: give [{rows}, {length - 1}, V] marks or [{rows}, {length - 1}, K] ids."
        )
    out = torch.zeros(where.shape, device=ids.device)
    entropies = torch.zeros_like(out)
    if not where.any():
        return TokenScores(out, entropies)
    hidden = _hidden(model, ids, segment_ids, lengths, routing, trace)[where]
    labels, divisors = ids[:, 1:][where], divisor[where]
    marks = None if sampling_mask is None else sampling_mask[where]
    logprob_parts, entropy_parts = [], []
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        given = (model, hidden[part], labels[part], divisors[part], None if marks is None else marks[part])
        is_training = torch.is_grad_enabled()
        found = checkpoint(_score, *given, use_reentrant=False) if is_training else _score(*given)
        logprob_parts.append(found[0])
        entropy_parts.append(found[1])
    out = out.masked_scatter(where, torch.cat(logprob_parts))
    entropies = entropies.masked_scatter(where, torch.cat(entropy_parts))
    return TokenScores(out, entropies)


def _hidden(
    model: Transformer,
    ids: Tensor,
    segment_ids: Tensor | None,
    lengths: Sequence[int] | None,
    routing: Mapping[str, Tensor] | None,
    trace: Trace | None,
) -> Tensor:
    """What enters the output head, [B, S - 1, D]; the last token predicts nothing, so it isn't computed."""
    count = ids.shape[1] - 1
    if routing is not None:
        trace = Trace() if trace is None else trace
        trace.forced = {name: experts[:, :count] for name, experts in routing.items()}
    streams = model.forward_streams(
        ids[:, :-1],
        segment_ids=None if segment_ids is None else segment_ids[:, :-1],
        lengths=None if lengths is None else [min(n, count) for n in lengths],
        trace=trace,
    )
    return model.final_hidden(streams)


def _score(
    model: Transformer, hidden: Tensor, labels: Tensor, divisors: Tensor, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of some positions: hidden [N, D], labels [N] -> fp32 [N] twice."""
    logits = model.logits(hidden).float() / divisors.unsqueeze(-1)
    if marks is not None:
        kept = _kept(marks, logits.shape[-1])
        if not bool(kept.gather(-1, labels.unsqueeze(-1)).all()):
            raise RequestError(
                "sampling_mask excludes a token that stands in ids, which can't have been drawn from it. Masks and ids "
                "are not of the same rollout, or are shifted: row t of a mask is about token t + 1."
            )
        logits = logits.masked_fill(~kept, float("-inf"))
    every = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(every.exp() * every.masked_fill(every == float("-inf"), 0.0)).sum(-1)
    return every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def _kept(marks: Tensor, vocab_size: int) -> Tensor:
    """Which tokens take part, bool [N, V]: marks [N, V] or ids [N, K]; all of them where none is named."""
    if marks.dtype != torch.bool:
        ids = marks.long()
        marks = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
        marks.scatter_(1, torch.where(ids < 0, vocab_size, ids), True)
        marks = marks[:, :-1]
    return marks | ~marks.any(-1, keepdim=True)


def _predicted(ids: Tensor, segment_ids: Tensor | None, lengths: Sequence[int] | None) -> Tensor:
    """Where a token has one of its own document before it, bool [B, S - 1]."""
    where = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool, device=ids.device)
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, ids.shape)
        where &= (segment_ids[:, 1:] == segment_ids[:, :-1]).to(ids.device)
    if lengths is not None:
        count = torch.tensor(list(lengths), device=ids.device).unsqueeze(-1)
        where &= torch.arange(1, ids.shape[1], device=ids.device) < count
    return where


def _divisor(temperature: float | Tensor, where: Tensor) -> Tensor:
    value = torch.as_tensor(temperature, dtype=torch.float32, device=where.device)
    if not bool((value > 0).all()):
        raise RequestError(
            "temperature must be above 0: at 0 the likeliest token is certain and there is no distribution to score. "
            "Score greedy answers with temperature 1."
        )
    if value.ndim:
        _check_shape("temperature", value, where.shape)
    return value.expand(where.shape)


def _check_shape(name: str, found: Tensor, shape: Sequence[int]) -> None:
    if tuple(found.shape) != tuple(shape):
        raise RequestError(f"{name} has shape {tuple(found.shape)}, but {tuple(shape)} is needed here.")
