"""What training an adapter needs: parameters, and bytes of everything that has to be in memory at once.

Counted from the network on torch's meta device and the files' formats, as `inventory.py` counts.

    weights      the frozen model, as stored (FP4 experts and FP8 projections for the released ones)
    adapter      A and B, fp32 masters
    gradients    of A and B, fp32
    optimizer    AdamW: two moments, fp32; Muon: one
    activations  what a backward pass with recomputation keeps of `tokens` tokens: each layer's incoming streams, and
                 one layer's own intermediates while it is computed again
    logits       one chunk of them three times, fp32: the student's, a teacher's, the gradient

Left out: the allocator's slack, and memory of the framework itself.
"""

from dataclasses import dataclass
from typing import Literal

from rorqual.config import ModelConfig
from rorqual.model.adapters import AdapterSpec, choose_targets
from rorqual.planner.parameters import build_on_meta
from rorqual.planner.tensors import WeightFormat, inventory

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class AdapterPlan:
    """Bytes of one training process that holds the whole model."""

    modules: int
    """Matrices that have an adapter; each routed expert's counts."""
    parameters: int
    """Trained numbers."""
    share: float
    """Of the model's own parameters."""
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.logits

    @property
    def saved(self) -> int:
        """Bytes of a checkpoint: adapter and optimizer, not the frozen model."""
        return self.adapter + self.optimizer

    def fits(self, memory_bytes: float, reserve: float = 0.1) -> bool:
        """Whether it finds room in so much memory, of which the share `reserve` is kept for everything else."""
        return self.total <= memory_bytes * (1 - reserve)


def adapter_plan(
    config: ModelConfig,
    spec: AdapterSpec,
    *,
    weights: WeightFormat = "official",
    tokens: int = 4096,
    chunk: int = 1024,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> AdapterPlan:
    """Plan the training of `spec` on a model of `config` with micro-batches of `tokens` tokens.

    Raises: ConfigError for targets that the model has not.
    """
    model = build_on_meta(config)
    modules = parameters = 0
    for target in choose_targets(model, spec):
        *stack, out, width = target.shape
        count = stack[0] if stack else 1
        modules += count
        parameters += count * spec.rank * (out + width)
    every = sum(parameter.numel() for parameter in model.parameters())
    one = parameters * FP32
    return AdapterPlan(
        modules=modules,
        parameters=parameters,
        share=parameters / every,
        weights=inventory(config, weights).nbytes,
        adapter=one,
        gradients=one,
        optimizer=one * (2 if optimizer == "adamw" else 1),
        activations=activation_bytes(config, tokens),
        logits=3 * min(chunk, tokens) * config.vocab_size * FP32,
    )


def activation_bytes(config: ModelConfig, tokens: int) -> int:
    """bf16 activations of a backward pass that computes each layer again: streams before each, and one layer's own."""
    streams = config.hc_mult * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    experts = (config.num_experts_per_tok + 1) * (2 * config.hidden_size + 4 * config.moe_intermediate_size)
    attention = 4 * heads + config.q_lora_rank + config.o_groups * config.o_lora_rank + 2 * config.head_dim
    inside = 4 * streams + attention + experts
    return BF16 * tokens * (config.num_hidden_layers * streams + inside)
