"""On-policy distillation: the full-vocabulary reverse KL between a student and its teachers.

Source: V4 report, post-training (on-policy distillation). The student samples trajectories; at every token it wrote its
whole distribution p is compared with that q of each teacher i:

    L = sum_i w_i KL(p || q_i),    KL = sum_v p_v (log p_v - log q_v),    dKL/dz_v = p_v (log p_v - log q_v - KL)

with z the student's logits. The trajectory counts as given: no gradient passes through sampling. Logits are rebuilt
from the states before each head, a chunk of rows at a time, and the gradient is formed in the same pass, so of each
model never more than chunk x V logits exist. Left out: estimates from the sampled token alone, which cost less and have
far more variance.

R rows (places whose next token the student wrote), D hidden (each model's own), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.errors import ConfigError, RequestError
from rorqual.ops.linear import linear_exact


class Alteration(Protocol):
    """Turns a teacher's log probabilities into those of the teacher and a decision about it together."""

    def alter(self, log_q: Tensor, rows: slice) -> Tensor:
        """fp32 [r, V] of the rows `rows` -> the same of what is to be taught, every value finite. May write to
        `log_q`."""
        ...


@dataclass(frozen=True)
class Term:
    """One teacher at the rows of a call."""

    hidden: Tensor
    """[R, D], what enters the teacher's head."""
    head: Tensor
    """[V, D]."""
    weight: Tensor
    """fp32 [R]: the teacher's importance there, divided by whatever the loss is a mean over; 0 where it has no say."""
    alteration: Alteration | None = None


class Distilled(NamedTuple):
    """A loss and what it is made of."""

    loss: Tensor
    """fp32 scalar, with gradients to the student's hidden states and head."""
    kl: Tensor
    """fp32 [teachers, R], without gradient; 0 where a teacher has no say."""


def response_rows(mask: Sequence[bool]) -> list[int]:
    """The places whose next token the student wrote, of a trajectory's mask: what is compared.

    Prompts and tool results are masked: a place counts by the token that follows it.
    """
    return [place for place, is_written in enumerate(mask[1:]) if is_written]


def log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    """Log probabilities fp32 [r, V] of states [r, D] that enter a head [V, D], by the model's own arithmetic."""
    logits = linear_exact(hidden, head)
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))


def reverse_kl(hidden: Tensor, head: Tensor, terms: Sequence[Term], chunk: int = 1024) -> Distilled:
    """sum over rows and teachers of weight x KL(student || teacher).

    Shapes: hidden [R, D] and head [V, D] of the student; `chunk` rows of logits exist at a time, of the student and of
    one teacher. Raises: RequestError when shapes do not fit; ConfigError for a teacher with another vocabulary.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}, but at least one row of logits is needed at a time. Give 1 or more.")
    for number, term in enumerate(terms):
        if len(term.hidden) != len(hidden) or term.weight.shape != hidden.shape[:1]:
            raise RequestError(
                f"teacher {number} has {len(term.hidden)} states and weights of shape {tuple(term.weight.shape)} for "
                f"{len(hidden)} rows of the student, so they cannot be compared. Give one of each per row."
            )
        if term.head.shape[0] != head.shape[0]:
            raise ConfigError(
                f"teacher {number} predicts {term.head.shape[0]} ids and the student {head.shape[0]}, so their "
                "distributions cannot be compared. Distil between models of one vocabulary."
            )
    loss, kl = _ReverseKL.apply(hidden, head, list(terms), chunk)
    return Distilled(loss, kl)


def reverse_kl_reference(hidden: Tensor, head: Tensor, terms: Sequence[Term]) -> Distilled:
    """`reverse_kl` as it is written, all logits at once: what the chunked form is held to."""
    log_p = torch.log_softmax(hidden.float() @ head.float().T, -1)
    kls = []
    for term in terms:
        with torch.no_grad():
            log_q = torch.log_softmax(term.hidden.float() @ term.head.float().T, -1)
            if term.alteration is not None:
                log_q = term.alteration.alter(log_q, slice(0, len(hidden)))
        kls.append(torch.where(term.weight != 0, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0))
    kl = torch.stack(kls) if kls else log_p.new_zeros(0, len(hidden))
    weights = torch.stack([term.weight for term in terms]) if terms else kl
    return Distilled((weights * kl).sum(), kl.detach())


class _ReverseKL(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; the backward pass only scales what is there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, terms: list[Term], chunk: int) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        rows = hidden.shape[0]
        kl = torch.zeros(len(terms), rows, dtype=torch.float32, device=hidden.device)
        dhidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        dhead = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        for lo in range(0, rows, chunk):
            at = slice(lo, min(lo + chunk, rows))
            gradient = _chunk(hidden[at], head, terms, at, kl)
            if gradient is None:
                continue
            gradient = gradient.to(hidden.dtype)
            if dhidden is not None:
                dhidden[at] = gradient @ head.to(hidden.dtype)
            if dhead is not None:
                dhead += gradient.T @ hidden[at]
            del gradient  # before the next chunk's logits are made
        weights = torch.stack([term.weight for term in terms]) if terms else kl
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.save_for_backward(dhidden, dhead)
        ctx.mark_non_differentiable(kl)
        return (weights.float() * kl).sum(), kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scaled = [
            None if gradient is None else (gradient * grads[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None


def _chunk(hidden: Tensor, head: Tensor, terms: list[Term], at: slice, kl: Tensor) -> Tensor | None:
    """The gradient fp32 [r, V] of the loss by the logits of a chunk, whose divergences it writes to `kl`; None: no
    teacher has a say here."""
    log_p, gradient = None, None
    for number, term in enumerate(terms):
        weight = term.weight[at].float().unsqueeze(-1)
        if not weight.count_nonzero():
            continue
        if log_p is None:
            log_p = log_probs(hidden, head)
        log_q = log_probs(term.hidden[at], term.head)
        if term.alteration is not None:
            log_q = term.alteration.alter(log_q, at)
        apart = torch.sub(log_p, log_q, out=log_q)
        each = log_p.exp().mul_(apart).sum(-1, keepdim=True)
        kl[number, at] = torch.where(weight != 0, each, 0.0).squeeze(-1)
        apart.sub_(each).mul_(weight)
        gradient = apart if gradient is None else gradient.add_(apart)
    return None if log_p is None or gradient is None else gradient.mul_(log_p.exp_())
