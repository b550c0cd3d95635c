"""Keeping experts evenly busy: the router-bias rule, balanced hash tables, and the load figure.

Source: V3 report for the sign rule, V4 report for its speed. How V4 built its hash tables is not disclosed;
here tokens are placed greedily by corpus frequency, so the busiest expert is as idle as the commonest token
allows.
"""

import heapq
import random

import torch
from torch import Tensor, nn

from rorqual.seeds import derive


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """One step of the bias rule, in place: overloaded experts down by `speed`, underloaded ones up.

    Shapes: bias [E] float32, counts [E] (tokens each expert received in the whole step: all micro-batches and
    ranks).
    """
    counts = counts.to(bias.device, torch.float64)
    bias.add_(torch.sign(counts.mean() - counts).to(bias.dtype), alpha=speed)


def max_violation(counts: Tensor) -> float:
    """MaxVio: load of the busiest expert over the mean, minus one (0: perfect balance). Shape: counts [E]."""
    mean = counts.double().mean().item()
    return counts.max().item() / mean - 1.0 if mean > 0 else 0.0


def build_hash_table(token_counts: Tensor, num_experts: int, top_k: int, seed: int) -> Tensor:
    """A frequency-balanced table of experts: token id -> `top_k` distinct experts.

    Shapes: token_counts [V] (corpus frequencies) -> [V, top_k] int64. Tokens are taken from the commonest to
    the rarest and given the least loaded experts; `seed` breaks ties, so layers with different seeds get
    different tables. A token that never occurs weighs a little, so unseen ids spread evenly too.
    """
    generator = random.Random(seed)
    counts = token_counts.double().tolist()
    unseen = 1e-3
    order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    heap = [(0.0, generator.random(), expert) for expert in range(num_experts)]
    heapq.heapify(heap)
    table = torch.empty(len(counts), top_k, dtype=torch.int64)
    for token in order:
        chosen = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = torch.tensor([expert for _, _, expert in chosen])
        for load, _, expert in chosen:
            heapq.heappush(heap, (load + counts[token] + unseen, generator.random(), expert))
    return table


@torch.no_grad()
def install_hash_tables(model: nn.Module, token_counts: Tensor, seed: int) -> list[str]:
    """Give every hash-routed layer its own balanced table; returns the names of the buffers written.

    Shapes: token_counts [V], padded with zeros here when the model's vocabulary is larger.
    """
    names = []
    for name, buffer in model.named_buffers():
        if not name.endswith(".tid2eid"):
            continue
        gate = model.get_submodule(name.removesuffix(".tid2eid"))
        num_experts = gate.get_parameter("weight").shape[0]
        counts = torch.zeros(buffer.shape[0], dtype=torch.float64)
        counts[: token_counts.shape[0]] = token_counts.double()
        buffer.copy_(build_hash_table(counts, num_experts, buffer.shape[1], derive(seed, "hash-table", name)))
        names.append(name)
    return names


def router_biases(model: nn.Module) -> dict[str, Tensor]:
    """The bias buffers of learned routers by the router's module path (`layers.3.ffn.gate`)."""
    return {name.removesuffix(".bias"): buffer for name, buffer in model.named_buffers() if name.endswith(".gate.bias")}
