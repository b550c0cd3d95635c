"""Mixture of experts: hash-routed or learned top-k, clamped SwiGLU, one shared expert.

Source: V4 report section 2.1 (DeepSeekMoE with sqrt-softplus affinities, hash routing in the first layers);
checkpoint behaviour.

B batch, S tokens, D hidden, E experts, A active experts, I expert width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.health import watch_clamp, watch_router
from rorqual.model.layout import Layout
from rorqual.model.linear import Linear
from rorqual.model.trace import RouterRecord, Trace
from rorqual.ops.experts import grouped_experts, route
from rorqual.ops.frozen import LowRank, adapted_packed_experts, frozen_experts
from rorqual.ops.packed_weight import PackedWeight
from rorqual.ops.rounded_experts import rounded_experts
from rorqual.ops.streamed_experts import StreamedExperts, streamed_experts
from rorqual.ops.swiglu import swiglu


class Gate(nn.Module):
    """The router. Hash layers look the experts up in `tid2eid` [V, A]; others take the top-k of scores plus `bias`."""

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, cfg: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.hash_routed = spec.hash_routed
        self.active, self.scale = cfg.num_experts_per_tok, cfg.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        if spec.hash_routed:
            tokens, slots = torch.arange(cfg.vocab_size)[:, None], torch.arange(self.active)
            self.register_buffer("tid2eid", (tokens + slots + tokens // cfg.n_routed_experts) % cfg.n_routed_experts)
        else:
            self.register_buffer("bias", torch.zeros(cfg.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor, tokens: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], token ids [T] -> experts int64 [T, A], weights fp32 [T, A], scores fp32 [T, E].

        `forced` int64 [T, A] takes the place of selection; the weights are still the scores of now at those experts.
        """
        chosen = self.tid2eid[tokens] if forced is None and self.hash_routed else forced
        return route(x, self.weight, None if self.hash_routed else self.bias, chosen, self.active, self.scale)


class Experts(nn.Module):
    """Routed experts, stacked: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]."""

    streamed: StreamedExperts | None = None
    """Where they come from when they are not all in memory; then there are no stacks."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        shape = (cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.w3 = nn.Parameter(torch.empty(shape))

    def stacks(self) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w3 and w2 as products take them; packed ones as they are."""
        return self.w1, self.w3, self.w2

    def low_rank(self) -> dict[str, LowRank]:
        """Low-rank changes of the matrices by name (see `adapters.py`), which `stacks` adds to those not packed."""
        return {}


class SharedExpert(nn.Module):
    """The expert every token visits; same clamp as the routed ones, no routing weight."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.limit = cfg.swiglu_limit
        self.w1 = Linear(cfg.hidden_size, cfg.moe_intermediate_size)
        self.w2 = Linear(cfg.moe_intermediate_size, cfg.hidden_size)
        self.w3 = Linear(cfg.hidden_size, cfg.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit).to(x.dtype))


class MoE(nn.Module):
    """Routed experts plus the shared one: y = sum_a g_a expert_a(x) + shared(x)."""

    round_inputs = False
    """Whether the experts' products read FP8 (see `model/quantised.py`)."""

    exchange: Callable[..., Tensor] | None = None
    """Runs the routed experts in place of `grouped_experts`, when they lie on several ranks: the same arguments and
    the shared expert's part, to run while tokens travel; returns the sum of both, fp32 [T, D].
    """

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name, self.limit = spec, name, cfg.swiglu_limit
        self.gate = Gate(cfg, spec)
        self.experts = Experts(cfg)
        self.shared_experts = SharedExpert(cfg)

    def forward(self, x: Tensor, tokens: Tensor, layout: Layout, trace: Trace | None = None) -> Tensor:
        """x [B, S, D] (after ffn_norm), input token ids [B, S] -> [B, S, D]."""
        flat = x.flatten(0, 1)
        experts, weights, scores = self.gate(flat, tokens.flatten(), self._forced(x, trace))
        if trace is not None and trace.router:
            trace.routers.append(self._record(experts, scores, layout, trace.router_ids))
        if trace is not None and trace.health:
            self._watch(trace, flat, experts, scores, layout)
        e = self.experts
        if self.exchange is not None:
            y = self.exchange(
                flat, experts, weights, *e.stacks(), self.limit, lambda: self.shared_experts(flat).float()
            )
            return y.to(x.dtype).view_as(x)
        if e.streamed is not None:
            routed = streamed_experts(flat, experts, weights, e.streamed, self.limit)
            return (routed + self.shared_experts(flat).float()).to(x.dtype).view_as(x)
        run: Callable[..., Tensor] = rounded_experts if self.round_inputs else grouped_experts
        first: object = e.w1
        if isinstance(first, PackedWeight):  # see `packed_weights.py`
            changes = e.low_rank()
            run = partial(adapted_packed_experts, low_rank=changes) if changes else frozen_experts
            w1, w3, w2 = (cast(Tensor, w) for w in (e.w1, e.w3, e.w2))
        else:
            w1, w3, w2 = e.stacks()
        if run is grouped_experts and not torch.is_grad_enabled():  # without the sum in between
            shared = self.shared_experts(flat)
            return grouped_experts(flat, experts, weights, w1, w3, w2, self.limit, shared).view_as(x)
        routed = run(flat, experts, weights, w1, w3, w2, self.limit)
        return (routed + self.shared_experts(flat).float()).to(x.dtype).view_as(x)

    def _forced(self, x: Tensor, trace: Trace | None) -> Tensor | None:
        """The experts [T, A] that this call must use (see `Trace.forced`), or None."""
        if trace is None or trace.forced is None or self.spec.hash_routed:
            return None
        gate = self.gate
        ids = trace.forced_experts(f"{self.name}.gate", (x.shape[0], x.shape[1], gate.active), gate.weight.shape[0])
        return None if ids is None else ids.to(x.device)

    def _watch(self, trace: Trace, x: Tensor, experts: Tensor, scores: Tensor, layout: Layout) -> None:
        """Health figures of the router and of the routed experts' clamp."""
        probe, e = trace.probe(layout), self.experts
        watch_router(trace, self.name, scores, probe)
        if (
            e.streamed is None and isinstance(e.w1, Tensor) and e.w1.shape[0] == self.gate.weight.shape[0]
        ):  # all experts are here
            watch_clamp(trace, self.name, x, experts, e.w1, e.w3, self.limit, probe)

    def _record(self, experts: Tensor, scores: Tensor, layout: Layout, with_ids: bool) -> RouterRecord:
        """Counts and the sequence-wise balance loss: mean over rows of E/(A T) sum_e count_e mean_t share_e.

        A packed row counts as one sequence. Where rows are cut into parts, counts and loss are this part's share.
        """
        b, num_experts = layout.batch_size, scores.shape[-1]
        valid = layout.valid
        used = torch.zeros(scores.shape, device=scores.device).scatter_add_(
            -1, experts, torch.ones(experts.shape, device=scores.device)
        )
        share = scores / scores.sum(-1, keepdim=True)
        if valid is not None:
            used = used * valid.flatten().unsqueeze(-1)
            share = share * valid.flatten().unsqueeze(-1)
        counts = used.view(b, -1, num_experts).sum(1)
        loss = None
        if not self.spec.hash_routed:
            tokens = torch.tensor(layout.row_lengths, device=scores.device, dtype=torch.float32)
            tokens = tokens.clamp_min(1).unsqueeze(-1)
            frequency = layout.total(counts) * num_experts / (experts.shape[-1] * tokens)
            mean_share = share.view(b, -1, num_experts).sum(1) / tokens
            loss = (frequency * mean_share).sum(-1).mean()
        ids = experts.view(b, -1, experts.shape[-1]) if with_ids else None
        return RouterRecord(self.spec.index, f"{self.name}.gate", counts.sum(0), loss, self.spec.hash_routed, ids)
