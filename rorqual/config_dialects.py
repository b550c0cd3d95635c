"""The dialects of a V4 `config.json`, translated to one: DeepSeek's, its inference code's, and transformers' (5.23).

Where a file says one thing twice and differently it is refused: a silent choice would build another network.
"""

from collections.abc import Mapping
from typing import Any

from rorqual.errors import ConfigError

_INFERENCE_NAMES = {  # DeepSeek's inference code names some settings differently from config.json
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "norm_eps": "rms_norm_eps",
}
_ALIASES = {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"}
_LAYER_TYPES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
OWN_TYPE = "rorqual"
"""`model_type` of a network with parts that V4 has not (another residual path, Engram); no other code should load it.
"""
FIXED: dict[str, Any] = {  # settings with one possible value in this architecture
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_LEGACY_RATES = {
    "compress_rate_csa": "compressed_sparse_attention",
    "compress_rate_hca": "heavily_compressed_attention",
}
_DTYPES = ("float32", "bfloat16", "float16")


def read(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Constructor arguments of `ModelConfig` from a file's keys; what `known` does not name goes to `extra`.

    Raises ConfigError for another architecture, contradictions, and values of the wrong kind.
    """
    model_type = values.pop("model_type", "deepseek_v4")
    text_type = _object(values.get("text_config"), "text_config").get("model_type", "")
    if str(model_type).startswith("deepseek_v41") or str(text_type).startswith("deepseek_v41"):
        raise ConfigError(
            "This is a DeepSeek-V4.1 config (model_type deepseek_v41), another architecture: an encoder half and a "
            "decoder half whose layers share KV and index results, one kind of compression instead of CSA and HCA, "
            "hyper-connections computed a sublayer ahead, no hash routing, Engram memories, image input, and a DSpark "
            "drafter instead of MTP. Rorqual implements V4; use a V4 checkpoint."
        )
    if model_type not in ("deepseek_v4", OWN_TYPE):
        raise ConfigError(
            f"model_type is {model_type!r}, but this class describes deepseek_v4. Point it at a V4 config.json."
        )
    values.pop("architectures", None)
    for old, new in {**_INFERENCE_NAMES, **_ALIASES}.items():
        if old in values:
            values.setdefault(new, values.pop(old))
    for key, only in FIXED.items():
        if key in values and values.pop(key) != only:
            raise ConfigError(f"{key} must be {only!r} in a V4 network; nothing else is implemented or released.")
    if values.get("dtype") in _DTYPES:
        values.setdefault("torch_dtype", values.pop("dtype"))
    if values.get("quantization_config"):  # the released files say it so
        values.setdefault("activation_rounding", "v4")
    _read_schedule(values)
    _read_rope(values)
    args = {k: values.pop(k) for k in list(values) if k in known}
    args["extra"] = values
    return args


def _read_schedule(values: dict[str, Any]) -> None:
    """`compress_ratios` and `num_hash_layers`, also from transformers' lists of layer kinds."""
    layer_types = values.pop("layer_types", None)
    rates = dict(_object(values.pop("compress_rates", None), "compress_rates"))
    for legacy, name in _LEGACY_RATES.items():
        if legacy in values:
            rates.setdefault(name, values.pop(legacy))
    values.pop("partial_rotary_factor", None)
    csa, hca = rates.get("compressed_sparse_attention", 4), rates.get("heavily_compressed_attention")
    if csa != 4 or hca in (0, 4):
        raise ConfigError(
            f"compress_rates is {rates}; in V4 compressed_sparse_attention is 4 (overlap and indexer follow) and "
            "heavily_compressed_attention another block length such as 128."
        )
    ratios = values.get("compress_ratios")
    if ratios is not None and not isinstance(ratios, list | tuple):
        raise ConfigError(f"compress_ratios must be a list of integers, got {ratios!r}.")
    if layer_types is not None:
        if not isinstance(layer_types, list | tuple) or any(t not in _LAYER_TYPES for t in layer_types):
            names = ", ".join(_LAYER_TYPES)
            raise ConfigError(f"layer_types is {layer_types!r}; V4 layers are {names}. Correct the entry.")
        named = [hca if hca and _LAYER_TYPES[t] == 128 else _LAYER_TYPES[t] for t in layer_types]
        if ratios is None:
            mtp = values.get("num_nextn_predict_layers", 1)
            values["compress_ratios"] = [*named, *([0] * mtp if isinstance(mtp, int) and 0 <= mtp <= 64 else [])]
        elif list(ratios[: len(named)]) != named:
            raise ConfigError(
                f"layer_types (with compress_rates) means {named}, compress_ratios says {list(ratios)}. They describe "
                "different networks; remove the wrong one."
            )
    elif ratios is None:
        raise ConfigError(
            "compress_ratios is missing, so the kind of each layer is unknown (a guess would build a different model). "
            "Add one ratio per layer: 0 window only, 4 CSA, 128 HCA."
        )
    elif hca is not None and any(r not in (0, 4, hca) for r in ratios):
        raise ConfigError(f"compress_ratios {list(ratios)} and compress_rates {rates} disagree about HCA. Remove one.")
    mlp_types = values.pop("mlp_layer_types", None)
    if mlp_types is not None:
        kinds = list(mlp_types) if isinstance(mlp_types, list | tuple) else []
        count = kinds.count("hash_moe")
        if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count) or not kinds:
            raise ConfigError(f"mlp_layer_types is {mlp_types!r}; V4 has some hash_moe layers first, then moe layers.")
        values["num_hash_layers"] = count


def _read_rope(values: dict[str, Any]) -> None:
    """`rope_scaling` (DeepSeek), flat inference keys, or transformers' `rope_parameters`, to one `rope_scaling`."""
    parameters = _object(values.pop("rope_parameters", None), "rope_parameters")
    if parameters:
        nested = "main" in parameters or "compress" in parameters
        main = _object(parameters.get("main"), "rope_parameters.main") if nested else {}
        compress = _object(parameters.get("compress"), "rope_parameters.compress") if nested else parameters
        if "rope_theta" in main:
            values["rope_theta"] = main["rope_theta"]
        if nested and "rope_theta" in compress:
            values["compress_rope_theta"] = compress["rope_theta"]
        if compress.get("rope_type", compress.get("type", "default")) == "yarn":
            values["rope_scaling"] = compress
    original = values.pop("original_seq_len", None)
    names = {"rope_factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    flat = {new: values.pop(old) for old, new in names.items() if old in values}
    if original:  # 0 in the inference code means no scaling
        values.setdefault("rope_scaling", {"type": "yarn", "original_max_position_embeddings": original, **flat})
    scaling = _object(values.pop("rope_scaling", None), "rope_scaling")
    kind = scaling.get("type", scaling.get("rope_type"))
    if not scaling or kind == "default":
        return
    values["rope_scaling"] = {
        "type": kind,
        **{key: scaling[key] for key in ("factor", "original_max_position_embeddings") if key in scaling},
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
    }


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, got {value!r}.")
    return value
