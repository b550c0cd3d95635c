"""How many parameters a configuration has, and how many of them work on one token.

Counted from the network itself, built on torch's meta device (shapes without memory), so a changed
configuration changes the figures rightly and no formula can go stale. The rule is that of the published
figures:

    total       every weight of the main model; scales, the hash layers' tables, Engram's hash constants and the MTP
                module excluded
    activated   total without the embedding and Engram tables (lookups), with K of the E routed experts; the head counts
    with_mtp    total and the MTP module's own weights

A weight counts one whatever its stored width.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch

from rorqual.config import ModelConfig
from rorqual.model import Transformer

# the first pattern that occurs in a parameter's name gives its component; order matters
_COMPONENTS = (
    (r"^mtp\.", "mtp"),
    (r"^embed\.", "embedding"),
    (r"\.engram\.table$", "engram_tables"),
    (r"\.engram\.", "engram_fusion"),
    (r"^head\.", "head"),
    (r"\.indexer\.wq_b", "indexer_wq_b"),
    (r"\.indexer\.weights_proj", "indexer_weights_proj"),
    (r"\.indexer\.compressor", "indexer_compressor"),
    (r"\.compressor\.(wkv|wgate)", "compressor"),
    (r"\.compressor\.", "compressor_ape_norm"),
    (r"\.wq_a\.", "wq_a"),
    (r"\.wq_b\.", "wq_b"),
    (r"\.wkv\.", "wkv"),
    (r"\.wo_a\.", "wo_a"),
    (r"\.wo_b\.", "wo_b"),
    (r"\.(q_norm|kv_norm|attn_sink)", "attention_norms_sinks"),
    (r"\.gate\.(weight|bias)", "router"),
    (r"\.gate\.tid2eid$", "hash_tables"),
    (r"\.experts\.", "routed_experts"),
    (r"\.shared_experts\.", "shared_expert"),
    (r"\.hc_(attn|ffn)_", "hyper_connections"),
    (r"norm\.weight$|^hc_head_", "norms_hc_head"),
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameter counts of one configuration; see the module's text for the rule."""

    total: int
    activated: int
    with_mtp: int
    by_component: dict[str, int]
    """Counts by part of the network; `mtp` is not part of `total`, everything else adds up to it."""
    activated_routed_experts: int
    """Of `activated`, what the K chosen experts of all layers hold."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Build `config` on the meta device and count. Raises: ConfigError from an impossible configuration."""
    return count_model(build_on_meta(config), config)


def build_on_meta(config: ModelConfig) -> Transformer:
    """The network with shapes but no memory; v4-pro takes a moment, not terabytes."""
    with torch.device("meta"):
        return Transformer(config)


def count_model(model: Transformer, config: ModelConfig) -> ParameterCount:
    """Count a built model (any device)."""
    parts = {name: 0 for _, name in _COMPONENTS}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # the rest are tables of experts and constants of hashes
            parts[component(name)] += tensor.numel()
    parts = {name: count for name, count in parts.items() if count}
    total = sum(count for name, count in parts.items() if name != "mtp")
    routed = parts["routed_experts"]
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts
    return ParameterCount(
        total=total,
        activated=total - parts["embedding"] - parts.get("engram_tables", 0) - routed + chosen,
        with_mtp=total + parts.get("mtp", 0),
        by_component=parts,
        activated_routed_experts=chosen,
    )


@cache
def find_component(name: str) -> str | None:
    """Which row of the table a tensor belongs to; None for one that no network has."""
    return next((part for pattern, part in _COMPONENTS if re.search(pattern, name)), None)


def component(name: str) -> str:
    """Which row of the table a tensor of a network (our name) belongs to."""
    part = find_component(name)
    assert part is not None, f"tensor {name} belongs to no component; add a pattern for it"
    return part
