"""`ModelConfig`: three dialects of config.json, the round trip, and a clear refusal of what cannot be a network."""

import json
from pathlib import Path
from typing import Any

import pytest

from rorqual.config import ModelConfig, preset_names
from rorqual.errors import ConfigError

YARN = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


def small(**changes: Any) -> dict[str, Any]:
    values = {**ModelConfig.preset("minke").to_dict(), **changes}
    return {k: v for k, v in values.items() if v is not ...}


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cfg.to_dict()))
    assert ModelConfig.from_file(path) == cfg
    if cfg.engram is None:  # transformers has none; that it is refused is tested elsewhere
        assert ModelConfig.from_dict(cfg.to_transformers_dict()).layers == cfg.layers


def test_schedules_of_the_released_models() -> None:
    flash, pro = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro")
    kinds = [[spec.kind for spec in cfg.layers] for cfg in (flash, pro)]
    assert [(k.count("sliding"), k.count("csa"), k.count("hca")) for k in kinds] == [(2, 21, 20), (0, 30, 31)]
    assert [spec.index for spec in flash.layers if spec.hash_routed] == [0, 1, 2]
    assert [spec.kind for spec in flash.mtp_layers] == ["sliding"]
    assert not flash.mtp_layers[0].hash_routed


def test_inference_code_names_are_understood() -> None:
    names = {
        "hidden_size": "dim", "moe_intermediate_size": "moe_inter_dim", "num_hidden_layers": "n_layers",
        "num_hash_layers": "n_hash_layers", "num_nextn_predict_layers": "n_mtp_layers",
        "num_attention_heads": "n_heads",
        "num_experts_per_tok": "n_activated_experts", "routed_scaling_factor": "route_scale",
        "qk_rope_head_dim": "rope_head_dim", "sliding_window": "window_size", "rms_norm_eps": "norm_eps",
    }  # fmt: skip
    values = {names.get(k, k): v for k, v in small().items() if k not in ("rope_scaling", "model_type")}
    values |= {"original_seq_len": 65536, "rope_factor": 16, "beta_fast": 32, "beta_slow": 1}
    assert ModelConfig.from_dict(values).replace(extra={}) == ModelConfig.preset("minke").replace(extra={})


def test_unknown_keys_are_kept() -> None:
    cfg = ModelConfig.from_dict(small(my_note="kept"))
    assert cfg.extra["my_note"] == "kept"
    assert cfg.to_dict()["my_note"] == "kept"


def test_a_longer_ratio_list_is_read_as_the_trunk_s() -> None:
    ratios = [*ModelConfig.preset("minke").compress_ratios, 0, 0]
    assert ModelConfig.from_dict(small(compress_ratios=ratios)).layers == ModelConfig.preset("minke").layers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 17}, ["num_experts_per_tok 17", "n_routed_experts 16"]),
        ({"compress_ratios": [0, 0]}, ["compress_ratios has 2 entries", "num_hidden_layers=6"]),
        ({"compress_ratios": [0, 0, 4, -1, 4, 128]}, ["compress_ratios[3] is -1"]),
        ({"compress_ratios": [0, 0, 4, 1, 4, 128]}, ["compress_ratios[3] is 1"]),
        ({"compress_ratios": ...}, ["compress_ratios is missing", "one ratio per layer"]),
        ({"compress_ratios": "4"}, ["compress_ratios must be a list"]),
        ({"compress_ratios": [0, 0, 4, 128, 4, 128, 4]}, ["MTP", "must be 0"]),
        ({"o_groups": 3}, ["num_attention_heads 4", "o_groups 3"]),
        ({"qk_rope_head_dim": 15}, ["qk_rope_head_dim is 15", "even"]),
        ({"qk_rope_head_dim": 66}, ["wider than head_dim 64"]),
        ({"index_head_dim": 24}, ["index_head_dim is 24", "power of two"]),
        ({"index_head_dim": 8}, ["wider than index_head_dim 8"]),
        ({"hidden_size": "big"}, ["hidden_size must be an integer", "'big'"]),
        ({"hidden_size": True}, ["hidden_size must be an integer"]),
        ({"hidden_size": 0}, ["hidden_size is 0"]),
        ({"rope_theta": float("nan")}, ["rope_theta must be a finite number"]),
        ({"swiglu_limit": -1}, ["swiglu_limit"]),
        ({"num_hash_layers": 7}, ["num_hash_layers is 7", "num_hidden_layers=6"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads must be 1"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func must be 'sqrtsoftplus'"]),
        ({"model_type": "deepseek_v41"}, ["V4.1", "Engram"]),
        ({"model_type": "llama"}, ["model_type is 'llama'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling.type is 'linear'"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling lacks factor"]),
        ({"rope_scaling": 3}, ["rope_scaling must be an object"]),
        ({"rope_scaling": YARN | {"factor": 0}}, ["factor is 0"]),
        ({"rope_scaling": YARN | {"factor": "16"}}, ["factor is '16'"]),
        ({"rope_scaling": YARN | {"beta_slow": -1}}, ["beta_slow is -1"]),
        ({"compress_rope_theta": 1}, ["compress_rope_theta is 1", "above 1"]),
        ({"rope_parameters": [1]}, ["rope_parameters must be an object"]),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, ["compressed_sparse_attention is 4"]),
        ({"compress_rates": {"heavily_compressed_attention": 4}}, ["compress_rates is"]),
        ({"compress_rates": {"heavily_compressed_attention": 64}}, ["disagree about HCA"]),
        ({"layer_types": ["sliding_attention"] * 6}, ["different networks"]),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe", "moe"]}, ["hash_moe layers first"]),
        ({"mlp_layer_types": ["dense"] * 6}, ["mlp_layer_types is"]),
        ({"torch_dtype": "float3"}, ["torch_dtype is 'float3'"]),
        ({"eos_token_id": 4096}, ["eos_token_id is 4096", "vocabulary of 4096"]),
        ({"num_nextn_predict_layers": 10**30}, ["num_nextn_predict_layers"]),
        ({"vocab_size": ...}, ["lacks vocab_size"]),
        ({"activation_rounding": "v5"}, ["activation_rounding"]),
        ({"layer_types": ["full_attention"] * 6, "compress_ratios": ...}, ["full_attention"]),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(small(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_transformers_spellings() -> None:
    """Nested rope parameters win, as they do there; flat ones mean the compressed layers; legacy rates too."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 8e4}
    values = small(rope_scaling=..., rope_theta=..., compress_rope_theta=...)
    nested = ModelConfig.from_dict(
        {**values, "rope_theta": 1.0, "rope_parameters": {"main": {"rope_theta": 5e5}, "compress": yarn}}
    )
    assert (nested.rope_theta, nested.compress_rope_theta) == (5e5, 8e4)
    assert nested.rope_scaling is not None and nested.rope_scaling["factor"] == 4.0
    flat = ModelConfig.from_dict({**values, "rope_parameters": {k: v for k, v in yarn.items() if k != "rope_theta"}})
    assert flat.rope_scaling == nested.rope_scaling and flat.compress_rope_theta == 160000.0
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    types = [kinds[r] for r in ModelConfig.preset("minke").compress_ratios[:6]]
    legacy = ModelConfig.from_dict(small(compress_ratios=..., layer_types=types, compress_rate_hca=64))
    assert legacy.compress_ratios == (0, 0, 4, 64, 4, 64, 0)
    assert ModelConfig.from_dict(legacy.to_transformers_dict()) == legacy
    assert ModelConfig.from_dict(small(torch_dtype=..., dtype="bfloat16")).torch_dtype == "bfloat16"
    assert ModelConfig.from_dict(small(original_seq_len=0, rope_scaling=...)).rope_scaling is None


def test_configs_can_be_keys_and_extra_never_overrides() -> None:
    cfg = ModelConfig.preset("minke")
    assert {cfg: 1}[ModelConfig.preset("minke")] == 1
    assert cfg.replace(extra={"hidden_size": 7}).to_dict()["hidden_size"] == 128


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the model config .*Check the path"):
        ModelConfig.from_file(tmp_path / "none.json")
    for text, words in (("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "holds a JSON list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            ModelConfig.from_file(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no preset named 'moby'.*minke"):
        ModelConfig.preset("moby")
    with pytest.raises(ConfigError, match="no setting depth"):
        ModelConfig.preset("minke").replace(depth=3)
