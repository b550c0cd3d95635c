"""Tensor names: DeepSeek's official ones, ours, and those of transformers.

Ours are the official names with one difference: the routed experts of a layer are three stacked parameters.

    official        layers.N.ffn.experts.e.w1.weight [I, D]   one tensor per expert e; w2 [D, I], w3 [I, D]
    ours            layers.N.ffn.experts.w1 [E, I, D]         w2 [E, D, I], w3 [E, I, D]
    transformers    model.layers.N.mlp.experts.gate_up_proj [E, 2I, D] (rows of w1, then w3), .down_proj [E,
    D, I]

transformers has no MTP module: it ignores `mtp.*`, so those tensors keep their official names in its layout.

Source: the published checkpoints' indexes, and the names `DeepseekV4ForCausalLM` (5.23) saves. Its default
`save_pretrained` writes mixed spellings, part official and part its own, which depend on how the model was
loaded (`model.layers.N.attn.norm.weight` for the key norm, `attn.compressor.indexer.q_b_proj`, ...);
`to_official` reads those as well.
"""

import re

_TOP = {
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}
_COMPRESSOR = {"wkv.weight": "kv_proj.weight", "wgate.weight": "gate_proj.weight", "ape": "position_bias"}
_COMPRESSOR["norm.weight"] = "kv_norm.weight"

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "ffn.experts.down_proj": "mlp.experts.down_proj",
}
for _ours, _theirs in _COMPRESSOR.items():
    _LAYER[f"attn.compressor.{_ours}"] = f"self_attn.compressor.{_theirs}"
    _LAYER[f"attn.indexer.compressor.{_ours}"] = f"self_attn.compressor.indexer.{_theirs}"
for _side in ("attn", "ffn"):
    for _what in ("fn", "base", "scale"):
        _LAYER[f"hc_{_side}_{_what}"] = f"{_side}_hc.{_what}"

_TOP_BACK = {theirs: official for official, theirs in _TOP.items()}
_LAYER_BACK = {theirs: official for official, theirs in _LAYER.items()}

# words of mixed spellings, translated one by one where the tables above know no whole name
_WORDS = {
    "self_attn": "attn",
    "mlp": "ffn",
    "sinks": "attn_sink",
    "q_a_proj": "wq_a",
    "q_a_norm": "q_norm",
    "q_b_proj": "wq_b",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
    "kv_proj": "wkv",
    "position_bias": "ape",
    "e_score_correction_bias": "bias",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SHARED_WORDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_ATTENTION_WORDS = {"gate_proj": "wgate"}

_IN_LAYER = re.compile(r"(?:model\.)?((?:layers|mtp)\.\d+)\.(.+)")
_STACKED = re.compile(r"((?:layers|mtp)\.\d+\.ffn\.experts)\.(w[123])")
_EXPERT = re.compile(r"((?:layers|mtp)\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.(weight|scale)")

GATE_UP = "gate_up_proj"
DOWN = "down_proj"


def to_official(name: str) -> str:
    """The official name of a tensor, whichever layout it comes from; an unknown name is returned as it is.

    Fused experts keep a form of their own, `layers.N.ffn.experts.gate_up_proj` and `.down_proj`, because they
    hold many official tensors at once.
    """
    if name in ("lm_head.weight", "head.weight"):
        return "head.weight"
    if name.endswith(".weight_scale_inv"):  # a scale; despite the name it is multiplied
        weight = to_official(name.removesuffix("_scale_inv"))
        return weight.removesuffix("weight") + "scale"
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        bare = name.removeprefix("model.")
        return _TOP_BACK.get(bare, bare if bare in _TOP else name)
    layer, rest = match.groups()
    official = _LAYER_BACK.get(rest) or (rest if rest in _LAYER else _read_mixed(rest))
    if official in _LAYER or _EXPERT.fullmatch(f"{layer}.{official}"):
        return f"{layer}.{official}"
    return name


def _read_mixed(rest: str) -> str:
    """A layer's tensor name in any mixture of the two spellings -> official, if it is one at all."""
    words = [_WORDS.get(word, word) for word in rest.split(".") if word != "scorer"]
    own = _SHARED_WORDS if "shared_experts" in words else _ATTENTION_WORDS if words[0] == "attn" else {}
    words = [own.get(word, word) for word in words]
    if len(words) == 2 and words[0] in ("attn_hc", "ffn_hc"):
        return f"hc_{words[0].removesuffix('_hc')}_{words[1]}"
    if words[0] != "attn":
        return ".".join(words)
    inside = [word for word in words[1:] if word not in ("compressor", "indexer")]
    is_index = "indexer" in words
    if not is_index and "compressor" not in words:
        inside = ["kv_norm" if word == "norm" else word for word in inside]
        return ".".join(["attn", *inside])
    inside = ["norm" if word == "kv_norm" else word for word in inside]
    room = ["attn", "indexer"] if is_index else ["attn"]
    if not is_index or inside[:1] not in (["wq_b"], ["weights_proj"]):
        room.append("compressor")
    return ".".join([*room, *inside])


def to_transformers(official: str) -> str:
    """The transformers name of an official (or fused-expert) name; `mtp.*` and unknown names stay as they
    are.

    >>> to_transformers("layers.3.attn.indexer.compressor.ape")
    'model.layers.3.self_attn.compressor.indexer.position_bias'
    """
    if official == "head.weight":
        return "lm_head.weight"
    if official in _TOP:
        return f"model.{_TOP[official]}"
    match = _IN_LAYER.fullmatch(official)
    if match is None or official.startswith("mtp."):
        return official
    layer, rest = match.groups()
    if rest.endswith(".scale"):
        weight = rest.removesuffix("scale") + "weight"
        return f"model.{layer}.{_LAYER[weight]}_scale_inv" if weight in _LAYER else official
    return f"model.{layer}.{_LAYER[rest]}" if rest in _LAYER else official


def split_stacked(ours: str) -> tuple[str, str] | None:
    """`layers.3.ffn.experts.w1` -> (`layers.3.ffn.experts`, `w1`); None for any other name."""
    match = _STACKED.fullmatch(ours)
    return (match.group(1), match.group(2)) if match else None


def expert_name(stack: str, expert: int, matrix: str) -> str:
    """Official name of one expert's matrix, such as `layers.3.ffn.experts.7.w1.weight`."""
    return f"{stack}.{expert}.{matrix}.weight"


def split_expert(official: str) -> tuple[str, int, str] | None:
    """Inverse of `expert_name` (scales too): the stack, the expert's index and the matrix; None otherwise."""
    match = _EXPERT.fullmatch(official)
    return (match.group(1), int(match.group(2)), match.group(3)) if match else None


def stays_fp32(name: str) -> bool:
    """Whether a tensor (ours or official name) is kept in fp32 in files and memory whatever the model's
    dtype.

    These are the mHC tensors, sinks, compressor position biases and router biases.
    """
    leaf = name.rsplit(".", 1)[-1]
    return leaf.startswith("hc_") or leaf in ("attn_sink", "ape") or name.endswith("gate.bias")
