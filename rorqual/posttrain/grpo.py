"""GRPO (group relative policy optimisation), the equations of the V3.2 report, one function each.

For a prompt q, responses o_1..o_G are sampled from pi_old, whose log-probabilities are those of the engine that
sampled them. With R_i the reward of response i:

    A_i   = R_i - mean(R)                                            `advantages`
    r_it  = pi_theta(o_it) / pi_old(o_it)                            `ratios`
    k_it  = r_it * (pi_ref/pi_theta - log(pi_ref/pi_theta) - 1)      `kl_terms`
    M_i   = 0 if A_i < 0 and mean_t log(pi_old/pi_theta) > delta     `sequence_mask`
    J     = mean_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1-epsilon, 1+epsilon) A_i) M_i - beta k_it ]

The loss is -J. Since r_it is taken to the sampling policy as the engine computed it, responses of a stale policy or of
another server are weighted right as they are; what M_i leaves out is what weighting cannot repair.

| | V3.2 report | R1 report | here |
|---|---|---|---|
| advantage over the group's standard deviation | no | yes | `scale` |
| epsilon | not published | 10 | 0.2 |
| delta | not published | none | 0.1 nats a token |
| beta | weak, or none for mathematics | 0.001 | 0.001 |
| samples a prompt | not published | 16 | 16 |
| reference refreshed every | not published | 400 steps | 400 steps |

Keep Routing and Keep Sampling Mask are no terms of the loss: pi_theta is computed with the experts, and over the
support, that the engine used (`scoring.py`), so r_it is 1 before the first update.

Left out: entropy bonuses, token-level averaging over the batch, and clipping of negative ratios, which the reports do
not use. Legend: `N` responses, `T` their tokens, right-padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def advantages(rewards_N: Tensor, groups_N: Tensor, *, scale: bool = False) -> Tensor:
    """A_i = R_i - mean over the responses to the same prompt; float64 [N].

    Shapes: rewards [N], and for each the number of its prompt, int64 [N]; groups may differ in size. A reward that is
    NaN is one nobody could decide: it counts in no mean and has advantage 0. With `scale` the difference is divided by
    the group's standard deviation, as R1 did; V3.2 does not, since that weighs prompts by how rarely they differ.
    """
    rewards_N = rewards_N.double()
    is_known_N = ~rewards_N.isnan()
    rewards_N = torch.where(is_known_N, rewards_N, 0.0)
    centred_N = torch.where(is_known_N, rewards_N - _group_mean(rewards_N, groups_N, is_known_N), 0.0)
    if scale:
        deviation_N = _group_mean(centred_N**2, groups_N, is_known_N).sqrt()
        centred_N = torch.where(deviation_N > 0, centred_N / deviation_N.clamp_min(1e-12), 0.0)
    return centred_N


def shift_abstentions(
    advantages_N: Tensor, groups_N: Tensor, is_abstention_N: Tensor, is_correct_N: Tensor, kappa: float
) -> Tensor:
    """Recipe R5: the advantages of abstentions move by kappa * (1 - 2p), others stay; float64 [N].

    p is the share of right answers among the group's attempts (responses that are no abstentions): where the model
    can answer, abstaining loses, and where it cannot, it gains, whatever the group's mean was. A group without any
    attempt says nothing about p and is not shifted. Shapes: bool [N]. Source: evaluation specification, section 7.4.
    """
    is_attempt_N = ~is_abstention_N
    p_N = _group_mean((is_correct_N & is_attempt_N).double(), groups_N, is_attempt_N)
    has_attempts_N = _group_sum(is_attempt_N.double(), groups_N) > 0
    shift_N = kappa * (1.0 - 2.0 * p_N)
    return advantages_N + torch.where(is_abstention_N & has_attempts_N, shift_N, 0.0)


def ratios(logprobs_NT: Tensor, old_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """r_it = pi_theta / pi_old where `mask` is True, 1 elsewhere. Shapes: log-probabilities [N, T], mask bool."""
    return torch.where(mask_NT, logprobs_NT - old_NT, 0.0).exp()


def kl_terms(logprobs_NT: Tensor, old_NT: Tensor, ref_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """k_it, the K3 estimate of KL(pi_theta || pi_ref) weighted by r_it; 0 where `mask` is False.

    Without the weight K3 is unbiased only on samples of pi_theta itself, and its gradient not even there; with it both
    the mean and the gradient are those of the KL, for samples of pi_old.
    """
    log_u_NT = torch.where(mask_NT, ref_NT - logprobs_NT, 0.0)
    return ratios(logprobs_NT, old_NT, mask_NT) * (log_u_NT.exp() - log_u_NT - 1.0) * mask_NT


def sequence_mask(
    logprobs_NT: Tensor, old_NT: Tensor, advantages_N: Tensor, mask_NT: Tensor, delta: float | None
) -> Tensor:
    """M_i: 0 for responses with a negative advantage that pi_theta has left too far behind, 1 for all others; [N].

    Far: the mean over the response's tokens of log(pi_old / pi_theta) is above `delta`. Punishing what the policy no
    longer does destabilises training; rewarding it does not, so positive ones always count. `None` masks nothing.
    """
    if delta is None:
        return torch.ones_like(advantages_N)
    with torch.no_grad():
        gap_N = response_mean(torch.where(mask_NT, old_NT - logprobs_NT, 0.0), mask_NT)
        return 1.0 - ((advantages_N < 0) & (gap_N > delta)).to(advantages_N.dtype)


def response_mean(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """1/|o_i| sum_t over the tokens of each response, [N]; 0 for one without tokens."""
    return (values_NT * mask_NT).sum(-1) / mask_NT.sum(-1).clamp_min(1)


@dataclass(frozen=True)
class Objective:
    """J_i of some responses, [N] with gradient, and what is worth watching; sums over tokens or responses, detached.

    num_tokens: tokens in all. clipped: tokens whose ratio lies where the clipped term was chosen. masked: responses
    with M_i = 0. kl: of k_it, 0 without a reference. drift: of |log pi_theta - log pi_old|, before the first update of
    a batch the mismatch of trainer and engine. surprise: of -log pi_theta, on fresh samples an unbiased estimate of
    the policy's entropy. ratio: of r_it.
    """

    per_response_N: Tensor
    num_tokens: int
    clipped: float
    masked: float
    kl: float
    drift: float
    surprise: float
    ratio: float


def objective(
    logprobs_NT: Tensor,
    old_NT: Tensor,
    advantages_N: Tensor,
    mask_NT: Tensor,
    *,
    ref_NT: Tensor | None = None,
    epsilon: float = 0.2,
    delta: float | None = 0.1,
    beta: float = 0.0,
) -> Objective:
    """J_i of each response; the loss of a batch is minus their mean.

    Shapes: log-probabilities of the trained, sampling and reference policy [N, T], float; advantages [N]; mask bool
    [N, T], True where the policy chose the token (so results of tools count neither in the sum nor in |o_i|).
    `ref_NT` is needed when beta is not 0.
    """
    old_NT, advantages_N = old_NT.to(logprobs_NT.dtype), advantages_N.to(logprobs_NT.dtype)
    A_N1 = advantages_N[:, None]
    r_NT = ratios(logprobs_NT, old_NT, mask_NT)
    free_NT, clipped_NT = r_NT * A_N1, r_NT.clamp(1.0 - epsilon, 1.0 + epsilon) * A_N1
    M_N = sequence_mask(logprobs_NT, old_NT, advantages_N, mask_NT, delta)
    gain_NT = torch.minimum(free_NT, clipped_NT) * M_N[:, None]
    k_NT = None
    if beta:
        assert ref_NT is not None, "beta is not 0, so a reference is needed"
        k_NT = kl_terms(logprobs_NT, old_NT, ref_NT.to(logprobs_NT.dtype), mask_NT)
        gain_NT = gain_NT - beta * k_NT
    return Objective(
        per_response_N=response_mean(gain_NT, mask_NT),
        num_tokens=int(mask_NT.sum()),
        clipped=_total((clipped_NT < free_NT).to(r_NT.dtype), mask_NT),
        masked=float((1.0 - M_N).sum()),
        kl=0.0 if k_NT is None else _total(k_NT, mask_NT),
        drift=_total(torch.where(mask_NT, logprobs_NT - old_NT, 0.0).abs(), mask_NT),
        surprise=_total(torch.where(mask_NT, -logprobs_NT, 0.0), mask_NT),
        ratio=_total(r_NT, mask_NT),
    )


def _total(values_NT: Tensor, mask_NT: Tensor) -> float:
    return float((values_NT.detach() * mask_NT).sum(dtype=torch.float64))


def _group_sum(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """For each response the sum over its group, [N]."""
    count = int(groups_N.max()) + 1 if groups_N.numel() else 0
    return values_N.new_zeros(count).index_add_(0, groups_N, values_N)[groups_N]


def _group_mean(values_N: Tensor, groups_N: Tensor, counts_N: Tensor) -> Tensor:
    """For each response the mean over those of its group where `counts` is True, 0 without any; [N]."""
    weights_N = counts_N.to(values_N.dtype)
    return _group_sum(values_N * weights_N, groups_N) / _group_sum(weights_N, groups_N).clamp_min(1.0)
