"""The equations of GRPO against loops written from the report, finite differences and enumeration."""

import math
import random

import pytest
import torch

from rorqual.posttrain import grpo


def drawn(seed: int, num: int = 5, most: int = 7, spread: float = 0.6):
    """Random log-probabilities of three policies, a ragged mask with gaps, and advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    new, old, ref = (-3 * torch.rand(num, most, generator=g, dtype=torch.float64) for _ in range(3))
    new = old + spread * torch.randn(num, most, generator=g, dtype=torch.float64)
    ref = old + spread * torch.randn(num, most, generator=g, dtype=torch.float64)
    mask = torch.rand(num, most, generator=g) < 0.7
    mask[:, 0] = True
    advantages = torch.randn(num, generator=g, dtype=torch.float64)
    return new, old, ref, mask, advantages


def plain_objective(new, old, ref, mask, advantages, *, epsilon, delta, beta) -> float:
    """J in plain Python, from the report's formulas."""
    responses = []
    for i, a in enumerate(advantages.tolist()):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        gap = sum(float(old[i, t] - new[i, t]) for t in steps) / len(steps)
        m = 0.0 if delta is not None and a < 0 and gap > delta else 1.0
        total = 0.0
        for t in steps:
            r = math.exp(new[i, t]) / math.exp(old[i, t])
            u = math.exp(ref[i, t]) / math.exp(new[i, t])
            clipped = min(max(r, 1 - epsilon), 1 + epsilon)
            total += min(r * a, clipped * a) * m - beta * r * (u - math.log(u) - 1)
        responses.append(total / len(steps))
    return sum(responses) / len(responses)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("epsilon", "delta", "beta"), [(0.2, 0.1, 0.0), (0.2, 0.1, 0.05), (10.0, None, 0.001)])
def test_objective_is_the_report_s(seed: int, epsilon: float, delta: float | None, beta: float) -> None:
    new, old, ref, mask, advantages = drawn(seed)
    found = grpo.objective(
        new, old, advantages, mask, ref_NT=ref if beta else None, epsilon=epsilon, delta=delta, beta=beta
    )
    plain = plain_objective(new, old, ref, mask, advantages, epsilon=epsilon, delta=delta, beta=beta)
    assert float(found.per_response_N.mean()) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_finite_differences(seed: int) -> None:
    new, old, ref, mask, advantages = drawn(seed)
    options = {"epsilon": 0.3, "delta": 0.1, "beta": 0.1}
    new.requires_grad_()
    grpo.objective(new, old, advantages, mask, ref_NT=ref, **options).per_response_N.mean().backward()
    step = 1e-6
    for i in range(new.shape[0]):
        for t in range(new.shape[1]):
            moved = torch.zeros_like(old)
            moved[i, t] = step
            up, down = (
                plain_objective(new.detach() + s * moved, old, ref, mask, advantages, **options) for s in (1, -1)
            )
            assert float(new.grad[i, t]) == pytest.approx((up - down) / (2 * step), abs=1e-7)


def test_what_stands_under_the_mask_does_not_matter() -> None:
    new, old, ref, mask, advantages = drawn(1)
    kept = grpo.objective(new, old, advantages, mask, ref_NT=ref, beta=0.1)
    spoilt = [torch.where(mask, values, float("-inf")).requires_grad_() for values in (new, old, ref)]
    again = grpo.objective(spoilt[0], spoilt[1].detach(), advantages, mask, ref_NT=spoilt[2].detach(), beta=0.1)
    torch.testing.assert_close(again.per_response_N, kept.per_response_N, rtol=0, atol=0)
    again.per_response_N.sum().backward()
    assert torch.isfinite(spoilt[0].grad).all() and not spoilt[0].grad[~mask].any()


def test_advantages_are_centred_and_not_scaled() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 7.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    assert grpo.advantages(rewards, groups).tolist() == [0.75, -0.25, -0.25, -0.25, -1.0, 1.0]
    scaled = grpo.advantages(rewards, groups, scale=True)
    assert scaled[4:].tolist() == pytest.approx([-1.0, 1.0])
    assert float(scaled[:4].square().mean()) == pytest.approx(1.0)
    assert grpo.advantages(torch.ones(3), torch.zeros(3, dtype=torch.int64), scale=True).tolist() == [0.0] * 3


def test_an_undecided_reward_counts_in_no_mean() -> None:
    rewards = torch.tensor([1.0, float("nan"), 0.0, float("nan")])
    groups = torch.tensor([0, 0, 0, 1])
    assert grpo.advantages(rewards, groups).tolist() == [0.5, 0.0, -0.5, 0.0]


def test_abstentions_move_by_what_attempts_show() -> None:
    groups = torch.tensor([0] * 5 + [1] * 2)
    abstained = torch.tensor([True, True, False, False, False, True, True])
    right = torch.tensor([False, False, True, True, False, False, False])
    before = torch.arange(7, dtype=torch.float64)
    after = grpo.shift_abstentions(before, groups, abstained, right, kappa=0.5)
    shift = 0.5 * (1 - 2 * 2 / 3)
    assert (after - before).tolist() == pytest.approx([shift, shift, 0, 0, 0, 0, 0])


def test_only_stale_and_punished_responses_are_masked() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    old = torch.zeros(4, 3)
    new = torch.tensor([[-0.2], [-0.2], [-0.05], [0.5]]).expand(4, 3)
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    assert grpo.sequence_mask(new, old, advantages, mask, 0.1).tolist() == [0, 1, 1, 1]
    assert grpo.sequence_mask(new, old, advantages, mask, None).tolist() == [1, 1, 1, 1]


def test_a_positive_advantage_raises_the_log_probability() -> None:
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[1], [2]])
    scored = logits.log_softmax(-1).gather(1, chosen)
    old = scored.detach()
    found = grpo.objective(scored, old, torch.tensor([1.0, -1.0]), torch.ones(2, 1, dtype=torch.bool))
    (-found.per_response_N.mean()).backward()
    after = (logits.detach() - 0.1 * logits.grad).log_softmax(-1).gather(1, chosen)
    assert after[0] > old[0] and after[1] < old[1]


def test_kl_and_its_gradient_are_unbiased_on_another_policy_s_samples() -> None:
    """Over a vocabulary small enough to enumerate, the mean of k over pi_old is KL(theta || ref); so its gradient."""
    g = torch.Generator().manual_seed(3)
    theta, old, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
    theta.requires_grad_()
    p, q, r = theta.log_softmax(-1), old.log_softmax(-1), ref.log_softmax(-1)
    whole = torch.ones(6, 1, dtype=torch.bool)
    k = grpo.kl_terms(p[:, None], q[:, None], r[:, None], whole)[:, 0]
    estimate, exact = (q.exp() * k).sum(), (p.exp() * (p - r)).sum()
    assert float(estimate) == pytest.approx(float(exact), abs=1e-12)
    (found,), (wanted,) = (torch.autograd.grad(value, theta, retain_graph=True) for value in (estimate, exact))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_counts_of_clipped_and_masked() -> None:
    new = torch.tensor([[0.5, 0.0, -0.5], [0.5, 0.0, -0.5]])
    old = torch.zeros(2, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = grpo.objective(new, old, torch.tensor([1.0, -1.0]), mask, epsilon=0.2, delta=0.1)
    # clipped: e^0.5 where A > 0; the second response is not masked, as its gap is below 0
    assert (found.num_tokens, found.clipped, found.masked) == (5, 1.0, 0.0)
    assert found.drift == pytest.approx(1.5) and found.surprise == pytest.approx(-0.5)


def test_groups_in_any_order() -> None:
    order = list(range(9))
    random.Random(0).shuffle(order)
    groups = torch.tensor([i // 3 for i in order])
    rewards = torch.tensor([float(i) for i in order])
    found = grpo.advantages(rewards, groups).tolist()
    assert found == [float(i % 3 - 1) for i in order]
