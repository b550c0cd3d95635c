"""What llama.cpp's `deepseek4` loader calls our tensors, settings and tokens."""

import json
import re
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError

_TOP = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.experts.w1": "ffn_gate_exps.weight",
    "ffn.experts.w2": "ffn_down_exps.weight",
    "ffn.experts.w3": "ffn_up_exps.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}
for _ours, _theirs in (("wkv.weight", "kv"), ("wgate.weight", "gate"), ("ape", "ape"), ("norm.weight", "norm")):
    _LAYER[f"attn.compressor.{_ours}"] = f"attn_compressor_{_theirs}.weight"
    _LAYER[f"attn.indexer.compressor.{_ours}"] = f"indexer_compressor_{_theirs}.weight"
for _side in ("attn", "ffn"):
    for _what in ("fn", "base", "scale"):
        _LAYER[f"hc_{_side}_{_what}"] = f"hc_{_side}_{_what}.weight"

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SQRT_SOFTPLUS = 4
_V4_SPLITS = (r"\p{N}{1,3}", r"\p{N}{1,1}")
"""First stage of the pre-tokenizer: V4's, and ours of small vocabularies, which have no token of several digits."""


def gguf_name(ours: str) -> str:
    """Name of a tensor in the file. Raises: ConfigError for one that llama.cpp does not have."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", ours)
    name = _TOP.get(ours) if found is None else _LAYER.get(found.group(2))
    if name is None:
        raise ConfigError(
            f"llama.cpp's deepseek4 has no tensor for {ours}, so it would run another network. Use --to official or "
            "--to transformers."
        )
    return name if found is None else f"blk.{found.group(1)}.{name}"


def key_values(config: ModelConfig, name: str) -> list[tuple[str, Any]]:
    """Settings of the network, in order. Raises: ConfigError for one that llama.cpp cannot express."""
    ratios = list(config.compress_ratios[: config.num_hidden_layers])
    if config.engram is not None or config.residual != "mhc":
        raise ConfigError(
            "llama.cpp's deepseek4 has hyper-connections of the mhc kind only, and no Engram memory. Use --to official."
        )
    if not set(ratios) <= {0, 4, 128}:
        raise ConfigError(
            f"the model's compress_ratios are {sorted(set(ratios))}, and llama.cpp's deepseek4 knows 0, 4 and 128 "
            "only. Use --to official or --to transformers."
        )
    if config.index_head_dim % 64:
        raise ConfigError(
            f"the indexer's heads are {config.index_head_dim} wide, and llama.cpp rotates them 64 channels at a time, "
            "so it would abort. V4's are 128. Use --to official or --to transformers."
        )
    arch: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.output_lora_rank": config.o_lora_rank,
        "attention.output_group_count": config.o_groups,
        "attention.sliding_window": config.sliding_window,
        "attention.compress_ratios": ratios,
        "attention.compress_rope_freq_base": float(config.compress_rope_theta),
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": 1,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": _SQRT_SOFTPLUS,
        "hash_layer_count": config.num_hash_layers,
        "swiglu_clamp_exp": [float(config.swiglu_limit)] * config.num_hidden_layers,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(config.hc_eps),
    }
    scaling = config.rope_scaling
    if scaling is not None:
        arch |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast", 32)),
            "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow", 1)),
        }
    return [("general.name", name), *((f"deepseek4.{key}", value) for key, value in arch.items())]


def tokenizer_values(folder: Path, config: ModelConfig) -> list[tuple[str, Any]]:
    """The vocabulary. Raises: CheckpointError without a tokenizer, or with one that llama.cpp would read otherwise."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, and a GGUF file holds the vocabulary. Put it there.")
    content = json.loads(path.read_text(encoding="utf-8"))
    stages = (content.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    if stages[0].get("pattern", {}).get("Regex") not in _V4_SPLITS:
        raise CheckpointError(
            f"{path} splits text in another way than V4's tokenizer, and llama.cpp has no name for it: it would read "
            "prompts as other tokens. Use the model's own tokenizer.json."
        )
    tokens = {token_id: (token, _NORMAL) for token, token_id in content["model"]["vocab"].items()}
    for one in content["added_tokens"]:
        tokens[one["id"]] = one["content"], _CONTROL if one["special"] else _USER_DEFINED
    words = [tokens.get(i, (f"[PAD{i}]", 5)) for i in range(config.vocab_size)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    return [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "deepseek-v3"),  # V4 kept V3's splits
        ("tokenizer.ggml.tokens", [word for word, _ in words]),
        ("tokenizer.ggml.token_type", [kind for _, kind in words]),
        ("tokenizer.ggml.merges", merges),
        ("tokenizer.ggml.bos_token_id", config.bos_token_id),
        ("tokenizer.ggml.eos_token_id", config.eos_token_id),
        ("tokenizer.ggml.padding_token_id", config.eos_token_id),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.ggml.add_eos_token", False),
    ]
