"""The peer of the parity tests: transformers' `DeepseekV4ForCausalLM`, held by its config, state dict and
logits only.

Tensors are named here by DeepSeek's official names with routed experts stacked (`layers.N.ffn.experts.w1`
[E, I, D]), the names of our parameters. The table below is written from the architecture document (section
4.7), not from our checkpoint code, so that a wrong export is seen. The peer's MTP module does not exist; its
tensors are left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

LAYER_KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention"}
HEAVY = "heavily_compressed_attention"

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_LEAVES = {
    "wkv.weight": "kv_proj.weight",
    "wgate.weight": "gate_proj.weight",
    "ape": "position_bias",
    "norm.weight": "kv_norm.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{part}_{leaf}": f"{part}_hc.{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    **{f"attn.compressor.{ours}": f"self_attn.compressor.{theirs}" for ours, theirs in _LEAVES.items()},
    **{f"attn.indexer.compressor.{ours}": f"self_attn.compressor.indexer.{t}" for ours, t in _LEAVES.items()},
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.experts.w2": "mlp.experts.down_proj",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
_OURS_TOP = {theirs: ours for ours, theirs in _TOP.items()}
_OURS_LAYER = {theirs: ours for ours, theirs in _LAYER.items()}


def build_config(config: Mapping[str, Any]) -> DeepseekV4Config:
    """The peer's configuration for one of ours given with the keys of DeepSeek's `config.json`."""
    kept = dict(config)
    layers = int(kept["num_hidden_layers"])
    ratios = [int(ratio) for ratio in kept.pop("compress_ratios")[:layers]]
    heavy = {ratio for ratio in ratios if ratio not in LAYER_KINDS}
    assert len(heavy) <= 1, "the peer knows one heavy ratio a model"
    kept["layer_types"] = [LAYER_KINDS.get(ratio, HEAVY) for ratio in ratios]
    kept["compress_rates"] = {LAYER_KINDS[4]: 4, HEAVY: heavy.pop() if heavy else 128}
    scaling = kept.pop("rope_scaling", None)
    if scaling:
        kept["rope_parameters"] = {
            "rope_type": scaling["type"],
            **{k: v for k, v in scaling.items() if k != "type"},
        }
    peer = DeepseekV4Config(**kept)
    assert peer.qk_rope_head_dim == config["qk_rope_head_dim"], "the peer rounded the rope width; draw other widths"
    return peer


def to_peer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names -> under the peer's."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        layer = re.match(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            found[_TOP[name]] = tensor
        elif layer[2] == "ffn.experts.w1":
            up = tensors[f"layers.{layer[1]}.ffn.experts.w3"]
            found[f"model.layers.{layer[1]}.mlp.experts.gate_up_proj"] = torch.cat([tensor, up], dim=1)
        elif layer[2] != "ffn.experts.w3":
            found[f"model.layers.{layer[1]}.{_LAYER[layer[2]]}"] = tensor
    return found


def to_ours(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Tensors (or absences) under the peer's names -> under ours; the way back of `to_peer`."""
    found: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            found[_OURS_TOP[name]] = tensor
        elif layer[2] == "mlp.experts.gate_up_proj":
            gate, up = (None, None) if tensor is None else tensor.chunk(2, dim=1)
            found[f"layers.{layer[1]}.ffn.experts.w1"] = gate
            found[f"layers.{layer[1]}.ffn.experts.w3"] = up
        else:
            found[f"layers.{layer[1]}.{_OURS_LAYER[layer[2]]}"] = tensor
    return found


def build_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DeepseekV4ForCausalLM:
    """The peer's model in fp32 holding `tensors` (our names), every one of its own accounted for."""
    peer_config = build_config(config)
    peer_config._attn_implementation = "eager"
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(peer_config)
    model = model.to_empty(device="cpu").float()
    for module in model.modules():  # rope tables are not in a state dict; make them again after `to_empty`
        if type(module).__name__ == "DeepseekV4RotaryEmbedding":
            model._init_weights(module)
    model.load_state_dict(to_peer(tensors), strict=True)
    return model.eval()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The peer's gradients under our names; None where autograd reached nothing."""
    return to_ours({name: parameter.grad for name, parameter in model.named_parameters()})
