"""Tiny networks with every kind of layer, filled with random weights that make each part matter."""

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.model import Transformer

TOLERANCE = 1e-4
"""Largest difference of logits (they are of order one), as in the conformance vectors."""

EXAMPLES = int(os.environ.get("RORQUAL_TEST_EXAMPLES", "20"))
SEED = os.environ.get("RORQUAL_TEST_SEED")


def life_settings(examples: int, steps: int) -> settings:
    """For state machines: so many lives of so many steps, the same ones each time."""
    return settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    """Window, CSA, HCA and CSA again; a window of 8 and three picks, so that every bound is met within 40
    tokens.

    Four indexer heads on purpose: ReLU then makes many scores exactly zero and ties are everywhere.
    """
    values: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 8, 4],
        "num_hash_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 24,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 1.0,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 3,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "hc_mult": 4,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    return ModelConfig.from_dict({**values, **changes})


def packable_config() -> ModelConfig:
    """One whose matrices FP8 and FP4 files can hold: blocks of 128 and 32, some of them cut short by the edges."""
    return config(
        hidden_size=160, moe_intermediate_size=96, num_hidden_layers=3, compress_ratios=[0, 4, 8, 0],
        num_nextn_predict_layers=1, head_dim=40, q_lora_rank=48,
    )  # fmt: skip


def build(cfg: ModelConfig, weights_seed: int = 0) -> Transformer:
    """A model whose norms are not one and whose sinks, biases, position tables and streams' bases are not
    zero.
    """
    model = Transformer(cfg).eval()
    draw = torch.Generator().manual_seed(weights_seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "tid2eid":
                order = torch.rand((tensor.shape[0], cfg.n_routed_experts), generator=draw).argsort(dim=1)
                tensor.copy_(order[:, : tensor.shape[1]])
                continue
            if not tensor.is_floating_point():  # constants of hashes
                continue
            noise = torch.randn(tensor.shape, generator=draw)
            if "norm" in name.split(".")[-2:][0]:
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() == 1 or leaf == "ape":
                tensor.copy_(0.5 * noise + (1.0 if leaf.endswith("_scale") else 0.0))
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def some_tokens(model: Transformer, *shape: int, draw_seed: int = 1) -> Tensor:
    """Random token ids."""
    draw = torch.Generator().manual_seed(draw_seed)
    return torch.randint(0, model.cfg.vocab_size, shape, generator=draw)


def full(model: Transformer, row: Tensor) -> Tensor:
    """Logits [S, V] of one row [S] in one pass without state: the truth of these tests."""
    with torch.no_grad():
        return model(row[None])[0]


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference; the shapes must be the same."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    return float((a - b).abs().max()) if a.numel() else 0.0


def drawn(examples: int = EXAMPLES) -> Callable[[Any], Any]:
    """The same draws on every run, unless `RORQUAL_TEST_SEED` is set; `RORQUAL_TEST_EXAMPLES` draws more."""

    def apply(test: Any) -> Any:
        rules = settings(
            max_examples=examples,
            derandomize=SEED is None,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        return rules(test) if SEED is None else seed(int(SEED))(rules(test))

    return apply


schedules = st.lists(st.sampled_from([0, 4, 4, 8]), min_size=1, max_size=4)
"""Layer kinds of a small network."""


def layers(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a few layers of any kinds."""
    ratios = draw(schedules)
    return {
        "num_hidden_layers": len(ratios),
        "compress_ratios": ratios,
        "num_hash_layers": draw(st.integers(0, len(ratios))),
        "sliding_window": draw(st.sampled_from([1, 3, 8, 64])),
        "index_topk": draw(st.sampled_from([1, 2, 3, 64])),
        "hc_mult": draw(st.sampled_from([1, 2, 4])),
    }


@st.composite
def models(draw: st.DrawFn) -> Transformer:
    """A random small network."""
    return build(config(**layers(draw)), draw(st.integers(0, 1000)))


@st.composite
def networks(draw: st.DrawFn) -> Transformer:
    """A random small network in fp32 or bf16, sizes that do not divide into vectors among them."""
    cfg = config(
        **layers(draw),
        hidden_size=draw(st.sampled_from([32, 40])),
        head_dim=draw(st.sampled_from([24, 32])),
        moe_intermediate_size=draw(st.sampled_from([16, 22])),
        activation_rounding=draw(st.sampled_from(["none", "none", "v4"])),
    )
    model = build(cfg, draw(st.integers(0, 1000)))
    return model.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@st.composite
def chunkings(draw: st.DrawFn, longest: int = 60) -> list[int]:
    """Lengths of consecutive chunks; single tokens are likely, as in decoding."""
    sizes = st.integers(1, 3) | st.integers(1, 20)
    chunks: list[int] = []
    for size in draw(st.lists(sizes, min_size=1, max_size=16)):
        if sum(chunks) + size <= longest:
            chunks.append(size)
    return chunks or [1]
