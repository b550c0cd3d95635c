"""Mixture of experts: hash-routed or learned top-k, clamped SwiGLU, one shared expert.

Source: V4 report section 2.1 (DeepSeekMoE with sqrt-softplus affinities, hash routing in the first layers);
checkpoint behaviour.

B batch, S tokens, D hidden, E experts, A active experts, I expert width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.layout import Layout
from rorqual.model.linear import Linear
from rorqual.model.trace import RouterRecord, Trace
from rorqual.ops.experts import fits_small, grouped_experts, router_scores, routing_weights, select_experts
from rorqual.ops.native import functions
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

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], token ids [T] -> experts int64 [T, A], weights fp32 [T, A], scores fp32 [T, E]."""
        scores = router_scores(x, self.weight)
        chosen = self.tid2eid[tokens] if self.hash_routed else select_experts(scores.detach(), self.bias, self.active)
        return chosen, routing_weights(scores, chosen, self.scale), scores


class Experts(nn.Module):
    """Routed experts, stacked: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        shape = (cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.w3 = nn.Parameter(torch.empty(shape))


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

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name, self.limit = spec, name, cfg.swiglu_limit
        self.gate = Gate(cfg, spec)
        self.experts = Experts(cfg)
        self.shared_experts = SharedExpert(cfg)

    def forward(self, x: Tensor, tokens: Tensor, layout: Layout, trace: Trace | None = None) -> Tensor:
        """x [B, S, D] (after ffn_norm), input token ids [B, S] -> [B, S, D]."""
        flat = x.flatten(0, 1)
        recorded = trace is not None and trace.router
        if not recorded and fits_small(flat, self.experts.w1):
            return self._small(flat, tokens).view_as(x)
        experts, weights, scores = self.gate(flat, tokens.flatten())
        if recorded and trace is not None:
            trace.routers.append(self._record(experts, scores, layout))
        e = self.experts
        routed = grouped_experts(flat, experts, weights, e.w1, e.w3, e.w2, self.limit)
        return (routed + self.shared_experts(flat).float()).to(x.dtype).view_as(x)

    def _small(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The same sum in one native call, for a handful of tokens."""
        gate, e, s = self.gate, self.experts, self.shared_experts
        hashed = self.spec.hash_routed
        return functions.moe_small(
            x, gate.weight, None if hashed else gate.bias, gate.tid2eid[tokens.flatten()] if hashed else None,
            (e.w1, e.w3, e.w2), (s.w1.weight, s.w3.weight, s.w2.weight), gate.active, gate.scale, self.limit,
        )  # fmt: skip

    def _record(self, experts: Tensor, scores: Tensor, layout: Layout) -> RouterRecord:
        """Counts and the sequence-wise balance loss: mean over rows of E/(A T) sum_e count_e mean_t share_e.

        A packed row counts as one sequence.
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
            tokens = torch.tensor(layout.lengths, device=scores.device, dtype=torch.float32).clamp_min(1).unsqueeze(-1)
            frequency = counts * num_experts / (experts.shape[-1] * tokens)
            mean_share = share.view(b, -1, num_experts).sum(1) / tokens
            loss = (frequency * mean_share).sum(-1).mean()
        return RouterRecord(self.spec.index, f"{self.name}.gate", counts.sum(0), loss, self.spec.hash_routed)
