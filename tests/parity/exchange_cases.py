"""What `test_expert_exchange.py` runs in each rank: exchanged experts beside one process that has everything."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.model.moe import MoE
from rorqual.ops.experts import experts_reference, grouped_experts
from rorqual.parallel.exchange import ExpertExchange

EXPERTS, LIMIT = 8, 1.5


@dataclass
class Case:
    """One call: how many tokens each of four ranks has, what each token chose, and the kind of numbers."""

    counts: list[int]
    """[4]; two ranks take them in pairs."""
    experts: list[list[int]]
    """[T][A] over the tokens of all ranks."""
    dtype: str = "float32"
    hidden: int = 48
    width: int = 32
    """Multiples of 16 may run in C; others never do."""


def gradient(tensor: Tensor) -> Tensor:
    """The gradient that a tensor must have by now."""
    assert tensor.grad is not None
    return tensor.grad


def run_cases(cases: list[Case]) -> list[str]:
    """What went wrong, in words; every rank runs every case."""
    return [f"{case}: {problem}" for case in cases for problem in check(case)]


def check(case: Case) -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensors, chosen, dy = draw(case)
    whole = [t.clone().requires_grad_() for t in tensors]
    if len(chosen):
        expected = grouped_experts(whole[0], chosen, *whole[1:], LIMIT)
        expected.backward(dy)
    else:  # no tokens anywhere
        expected = torch.zeros(0, case.hidden)
        for tensor in whole:
            tensor.grad = torch.zeros_like(tensor)

    per_rank = torch.tensor(case.counts).view(ranks, -1).sum(1).tolist()
    tokens = slice(sum(per_rank[:rank]), sum(per_rank[: rank + 1]))
    share = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    parts = [tokens, tokens, share, share, share]
    problems = []
    if case.dtype == "float32" and len(chosen):
        reference = experts_reference(tensors[0], chosen, *tensors[1:], LIMIT)
        if not torch.allclose(expected, reference, rtol=1e-5, atol=1e-5):
            problems.append("grouped_experts is not the reference")
    for waves in (1, 2, EXPERTS):
        mine = [t[part].clone().requires_grad_() for t, part in zip(tensors, parts, strict=True)]
        y = ExpertExchange(dist.group.WORLD, waves=waves)(mine[0], chosen[tokens], *mine[1:], LIMIT)
        y.backward(dy[tokens])
        if y.dtype is not torch.float32 or not torch.equal(y, expected[tokens]):
            problems.append(f"{waves} waves: another output")
        for name, ours, theirs, part in zip(("x", "weights", "w1", "w3", "w2"), mine, whole, parts, strict=True):
            assert ours.grad is not None and theirs.grad is not None
            if not torch.equal(ours.grad, theirs.grad[part]):
                problems.append(f"{waves} waves: another gradient of {name}")
    return problems


def draw(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, weights, w1, w3, w2; choices [T, A]; the gradient of the output. The same on all ranks."""
    g, total, kind = torch.Generator().manual_seed(len(case.experts)), sum(case.counts), getattr(torch, case.dtype)
    active = len(case.experts[0]) if case.experts else 2
    chosen = torch.tensor(case.experts, dtype=torch.int64).view(total, active)
    x, weights = torch.randn(total, case.hidden, generator=g).to(kind), torch.rand(total, active, generator=g)
    w1, w3 = (torch.randn(EXPERTS, case.width, case.hidden, generator=g) / 4 for _ in range(2))
    w2 = torch.randn(EXPERTS, case.hidden, case.width, generator=g)
    return [x, weights, w1, w3, w2], chosen, torch.randn(total, case.hidden, generator=g)


def run_moe() -> dict[str, Any]:
    """A MoE layer of a model with the exchange installed, its shared expert running meanwhile, against the same alone;
    and what calls do that not everybody makes: no gradient of x, a second backward, an expert that nobody holds.
    """
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    cfg = ModelConfig.preset("minke").replace(hidden_size=48, moe_intermediate_size=32, n_routed_experts=EXPERTS)
    alone, spread = (Transformer(cfg, seed=3) for _ in range(2))
    here, found = EXPERTS // ranks, {}
    a, b = (next(m for m in model.modules() if isinstance(m, MoE)) for model in (alone, spread))
    for parameter in b.experts.parameters():
        parameter.data = parameter.data[rank * here : (rank + 1) * here].clone()
    b.exchange = ExpertExchange(group, waves=2)
    g = torch.Generator().manual_seed(0)
    # 8 tokens x 8 experts are whole vectors: torch's softplus, in the router, rounds a tensor's last few otherwise
    x, ids = torch.randn(ranks, 8, 48, generator=g), torch.randint(0, cfg.vocab_size, (ranks, 8), generator=g)
    x_all, x_mine = x.clone().requires_grad_(), x[rank : rank + 1].clone().requires_grad_()
    y_all, y_mine = a(x_all, ids, None), b(x_mine, ids[rank : rank + 1], None)
    (y_all**2).sum().backward()
    (y_mine**2).sum().backward(retain_graph=True)
    assert x_all.grad is not None and x_mine.grad is not None
    found["output"] = torch.equal(y_mine[0], y_all[rank])
    found["gradient of x"] = torch.allclose(x_mine.grad[0], x_all.grad[rank], rtol=1e-5, atol=1e-6)
    shared = torch.stack([gradient(p) for p in b.shared_experts.w1.parameters()])
    dist.all_reduce(shared)
    found["gradient of the shared expert"] = torch.allclose(shared[0], gradient(a.shared_experts.w1.weight), atol=1e-5)
    first = x_mine.grad.clone()
    (y_mine**2).sum().backward()
    found["second backward"] = torch.equal(x_mine.grad, 2 * first)
    with torch.no_grad():
        y_here = b(x_mine, ids[rank : rank + 1], None)[0]
        found["without gradients"] = torch.equal(y_here, a(x_all, ids, None)[rank])

    tensors, chosen, dy = draw(Case([3] * 4, [[t % EXPERTS, (3 * t + 1) % EXPERTS] for t in range(12)]))
    each, share = 12 // ranks, slice(rank * here, (rank + 1) * here)
    tokens = slice(rank * each, (rank + 1) * each)
    matrices = [w[share].clone().requires_grad_() for w in tensors[2:]]
    exchange = ExpertExchange(group, waves=2)
    exchange(tensors[0][tokens], chosen[tokens], tensors[1][tokens], *matrices, LIMIT).backward(dy[tokens])
    whole = [w.clone().requires_grad_() for w in tensors[2:]]
    grouped_experts(tensors[0], chosen, tensors[1], *whole, LIMIT).backward(dy)
    found["experts alone have gradients"] = all(
        torch.equal(gradient(m), gradient(w)[share]) for m, w in zip(matrices, whole, strict=True)
    )
    try:
        exchange(tensors[0][:1], torch.tensor([[0, EXPERTS]]), tensors[1][:1], *matrices, LIMIT)
    except ConfigError as error:
        found["a refusal"] = f"expert {EXPERTS}" in str(error) and f"{EXPERTS} in all" in str(error)
    return found


def run_all(cases: list[Case]) -> tuple[list[str], dict[str, Any]]:
    """One spawn for all checks."""
    return run_cases(cases), run_moe()
