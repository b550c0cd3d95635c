"""The network that benchmarks compare, and transformers' `DeepseekV4ForCausalLM` with the same weights.

The network is `small.json`. Weights are drawn once, exported with `save_transformers` and loaded by both.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rorqual
from rorqual.model import Transformer, init_weights

PEER = "transformers"
CONFIG = Path(__file__).with_name("small.json")


def build_pair(config: rorqual.ModelConfig) -> tuple[Transformer, Any]:
    """Our network with drawn weights and the peer's with the same, through our export."""
    from transformers import DeepseekV4ForCausalLM

    torch.manual_seed(0)
    ours = Transformer(config)
    init_weights(ours, 0)
    with tempfile.TemporaryDirectory() as folder:
        rorqual.checkpoint.save_transformers(ours, folder)
        peer = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    peer.generation_config.eos_token_id = None  # no token ends a text on either side; by default token 1 does there
    return ours, peer


def check_agreement(ours: Transformer, peer: Any, tokens: Tensor) -> float:
    """Largest relative distance of a row of logits; raises when it is not rounding."""
    with torch.no_grad():
        a, b = ours(tokens), peer(tokens, use_cache=False).logits
    worst = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
    if not worst < 1e-4:
        raise SystemExit(f"The two networks differ by {worst:.2e} of a row's norm before timing; nothing to compare.")
    return worst


def activated_weights(model: nn.Module, config: rorqual.ModelConfig) -> int:
    """Weights a token is multiplied with: all matrices but the embedding, and the chosen share of the routed
    experts.
    """
    share = config.num_experts_per_tok / config.n_routed_experts
    total = 0.0
    for name, p in model.named_parameters():
        if p.dim() >= 2 and name != "embed.weight" and not name.startswith("mtp.") and not name.endswith(".ape"):
            total += p.numel() * (share if ".ffn.experts." in name else 1.0)
    return int(total)


def attention_products(config: rorqual.ModelConfig, length: int) -> float:
    """Multiply-adds of scores and values per token, averaged over a row of `length` tokens."""
    total = 0.0
    for spec in config.layers:
        for t in range(length):
            keys = min(t + 1, config.sliding_window)
            if spec.compress_ratio:
                entries = (t + 1) // spec.compress_ratio
                keys += min(entries, config.index_topk) if spec.has_indexer else entries
                if spec.has_indexer:
                    total += entries * config.index_n_heads * config.index_head_dim / length
            total += 2 * keys * config.num_attention_heads * config.head_dim / length
    return total
