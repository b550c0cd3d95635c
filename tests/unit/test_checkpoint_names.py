"""Tensor names: the three spellings translate into each other without loss, for every kind of layer.

The list of names and shapes below is written out from the layout of the published checkpoints, independently
of the code under test, so it also checks that a built model has exactly these tensors.
"""

import pytest
import torch

from rorqual.checkpoint import names
from rorqual.checkpoint.layout import file_tensors, gather, official_shards, scatter, shards_by_size
from rorqual.config import ModelConfig, preset_names
from rorqual.model import Transformer

Shapes = dict[str, tuple[int, ...]]


def layer_shapes(cfg: ModelConfig, ratio: int, is_hash: bool) -> Shapes:
    """Names (after `layers.N.`) and shapes of one layer, experts stacked."""
    d, q, k, h = cfg.hidden_size, cfg.q_lora_rank, cfg.head_dim, cfg.num_attention_heads
    e, i, n = cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hc_mult
    mix = 2 * n + n * n
    out: Shapes = {
        "attn.attn_sink": (h,),
        "attn.wq_a.weight": (q, d),
        "attn.q_norm.weight": (q,),
        "attn.wq_b.weight": (h * k, q),
        "attn.wkv.weight": (k, d),
        "attn.kv_norm.weight": (k,),
        "attn.wo_a.weight": (cfg.o_groups * cfg.o_lora_rank, h * k // cfg.o_groups),
        "attn.wo_b.weight": (d, cfg.o_groups * cfg.o_lora_rank),
        "attn_norm.weight": (d,),
        "ffn_norm.weight": (d,),
        "ffn.gate.weight": (e, d),
        "ffn.experts.w1": (e, i, d),
        "ffn.experts.w2": (e, d, i),
        "ffn.experts.w3": (e, i, d),
        "ffn.shared_experts.w1.weight": (i, d),
        "ffn.shared_experts.w2.weight": (d, i),
        "ffn.shared_experts.w3.weight": (i, d),
    }
    out |= {"ffn.gate.tid2eid": (cfg.vocab_size, cfg.num_experts_per_tok)} if is_hash else {"ffn.gate.bias": (e,)}
    for side in ("attn", "ffn"):
        out |= {f"hc_{side}_fn": (mix, n * d), f"hc_{side}_base": (mix,), f"hc_{side}_scale": (3,)}
    if ratio:
        out |= compressor_shapes("attn.compressor", cfg, k, ratio)
    if ratio == 4:
        out["attn.indexer.wq_b.weight"] = (cfg.index_n_heads * cfg.index_head_dim, q)
        out["attn.indexer.weights_proj.weight"] = (cfg.index_n_heads, d)
        out |= compressor_shapes("attn.indexer.compressor", cfg, cfg.index_head_dim, ratio)
    return out


def compressor_shapes(prefix: str, cfg: ModelConfig, width: int, ratio: int) -> Shapes:
    wide = 2 * width if ratio == 4 else width
    return {
        f"{prefix}.wkv.weight": (wide, cfg.hidden_size),
        f"{prefix}.wgate.weight": (wide, cfg.hidden_size),
        f"{prefix}.ape": (ratio, wide),
        f"{prefix}.norm.weight": (width,),
    }


def engram_shapes(cfg: ModelConfig) -> Shapes:
    """A block's Engram memory, `paper`, where only the first block of `engram.layers` is asked for."""
    e = cfg.engram
    assert e is not None and len(e.layers) == 1 and e.rows == 6240 and len(e.orders) * e.heads == 8
    channels, rows = cfg.hc_mult * cfg.hidden_size, 6247 + 6257 + 6263 + 6269 + 6271 + 6277 + 6287 + 6299
    return {
        "engram.hash.compression": (cfg.vocab_size,),
        "engram.hash.multipliers": (max(e.orders),),
        "engram.hash.sizes": (8,),
        "engram.hash.offsets": (8,),
        "engram.table": (rows, e.head_dim),
        "engram.proj.weight": (channels + cfg.hidden_size, 8 * e.head_dim),
        "engram.h_norm": (channels,),
        "engram.k_norm": (channels,),
        "engram.conv_norm": (channels,),
        "engram.conv": (channels, e.kernel),
    }


def model_shapes(cfg: ModelConfig) -> Shapes:
    """Every tensor of a model, our names."""
    d, n = cfg.hidden_size, cfg.hc_mult
    head: Shapes = {
        "norm.weight": (d,),
        "hc_head_fn": (n, n * d),
        "hc_head_base": (n,),
        "hc_head_scale": (1,),
    }
    out: Shapes = {"embed.weight": (cfg.vocab_size, d), "head.weight": (cfg.vocab_size, d)} | head
    for spec in cfg.layers:
        memory = engram_shapes(cfg) if spec.engram else {}
        for name, shape in (layer_shapes(cfg, spec.compress_ratio, spec.hash_routed) | memory).items():
            out[f"layers.{spec.index}.{name}"] = shape
    for j in range(cfg.num_nextn_predict_layers):
        extra: Shapes = {
            "e_proj.weight": (d, d),
            "h_proj.weight": (d, d),
            "enorm.weight": (d,),
            "hnorm.weight": (d,),
        }
        for name, shape in (layer_shapes(cfg, 0, False) | extra | head).items():
            out[f"mtp.{j}.{name}"] = shape
    return out


@pytest.mark.parametrize("preset", preset_names())
def test_a_model_has_exactly_the_published_tensors(preset: str):
    cfg = ModelConfig.preset(preset)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == model_shapes(cfg)


@pytest.mark.parametrize(("preset", "count"), [("v4-flash", 69_187), ("v4-pro", 145_116)])
def test_tensor_counts_of_the_published_checkpoints(preset: str, count: int):
    shapes = model_shapes(ModelConfig.preset(preset))
    stored = file_tensors(shapes, lambda _: False)
    fp8 = (
        "wq_a.weight",
        "wq_b.weight",
        "wkv.weight",
        "wo_a.weight",
        "wo_b.weight",
        "e_proj.weight",
        "h_proj.weight",
    )
    scales = sum((t.name.endswith(fp8) and "compressor" not in t.name) or "experts" in t.name for t in stored)
    assert len(stored) + scales == count


@pytest.mark.parametrize("preset", [name for name in preset_names() if ModelConfig.preset(name).engram is None])
def test_names_translate_both_ways(preset: str):
    shapes = model_shapes(ModelConfig.preset(preset))
    official = [tensor.name for tensor in file_tensors(shapes, lambda _: False)]
    assert all(names.to_official(name) == name for name in official)
    fused = [tensor.name for tensor in file_tensors(shapes, lambda stack: not stack.startswith("mtp."))]
    theirs = [names.to_transformers(name) for name in fused]
    assert len(set(theirs)) == len(fused)
    assert [names.to_official(name) for name in theirs] == fused
    assert all(name.startswith(("model.", "lm_head.", "mtp.")) for name in theirs)


@pytest.mark.parametrize(
    ("official", "theirs"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        ("norm.weight", "model.norm.weight"),
        ("hc_head_scale", "model.hc_head.hc_scale"),
        ("layers.7.attn.attn_sink", "model.layers.7.self_attn.sinks"),
        ("layers.7.attn.compressor.wgate.weight", "model.layers.7.self_attn.compressor.gate_proj.weight"),
        ("layers.7.attn.compressor.norm.weight", "model.layers.7.self_attn.compressor.kv_norm.weight"),
        ("layers.7.attn.indexer.compressor.ape", "model.layers.7.self_attn.compressor.indexer.position_bias"),
        (
            "layers.7.attn.indexer.weights_proj.weight",
            "model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight",
        ),
        ("layers.7.hc_ffn_base", "model.layers.7.ffn_hc.base"),
        ("layers.7.ffn.gate.bias", "model.layers.7.mlp.gate.e_score_correction_bias"),
        ("layers.7.ffn.shared_experts.w2.weight", "model.layers.7.mlp.shared_experts.down_proj.weight"),
        ("layers.7.attn.wq_a.scale", "model.layers.7.self_attn.q_a_proj.weight_scale_inv"),
        ("mtp.0.e_proj.weight", "mtp.0.e_proj.weight"),
    ],
)
def test_names_of_the_table(official: str, theirs: str):
    assert names.to_transformers(official) == theirs
    assert names.to_official(theirs) == official


@pytest.mark.parametrize(
    ("mixed", "official"),
    [
        ("attn.norm.weight", "attn.kv_norm.weight"),
        ("attn.kv_norm.weight", "attn.kv_norm.weight"),
        ("attn.q_a_proj.weight", "attn.wq_a.weight"),
        ("attn.compressor.gate_proj.weight", "attn.compressor.wgate.weight"),
        ("attn.compressor.norm.weight", "attn.compressor.norm.weight"),
        ("attn.compressor.indexer.norm.weight", "attn.indexer.compressor.norm.weight"),
        ("attn.compressor.indexer.position_bias", "attn.indexer.compressor.ape"),
        ("attn.compressor.indexer.q_b_proj.weight", "attn.indexer.wq_b.weight"),
        ("attn.compressor.indexer.scorer.weights_proj.weight", "attn.indexer.weights_proj.weight"),
        ("ffn.experts.5.w1.weight", "ffn.experts.5.w1.weight"),
        ("ffn.shared_experts.gate_proj.weight", "ffn.shared_experts.w1.weight"),
        ("hc_attn_fn", "hc_attn_fn"),
        ("attn_hc.fn", "hc_attn_fn"),
    ],
)
def test_mixed_spellings_are_understood(mixed: str, official: str):
    """transformers' `save_pretrained` writes such names by default."""
    assert names.to_official(f"model.layers.3.{mixed}") == f"layers.3.{official}"


@pytest.mark.parametrize("name", ["visual.weight", "model.layers.0.attn.surprise", "layers.x.attn.wq_a.weight"])
def test_unknown_names_stay_as_they_are(name: str):
    assert names.to_official(name) == name
    assert names.to_transformers(name) == name


def test_experts_are_told_apart():
    assert names.split_stacked("mtp.0.ffn.experts.w2") == ("mtp.0.ffn.experts", "w2")
    assert names.split_stacked("layers.0.ffn.shared_experts.w2.weight") is None
    assert names.split_expert("layers.12.ffn.experts.255.w3.scale") == ("layers.12.ffn.experts", 255, "w3")
    assert names.split_expert("layers.12.ffn.experts.w3") is None


def test_which_tensors_stay_fp32():
    kept = {name.split(".", 2)[-1] for name in model_shapes(ModelConfig.preset("minke")) if names.stays_fp32(name)}
    mixes = {f"hc_{side}_{what}" for side in ("attn", "ffn", "head") for what in ("fn", "base", "scale")}
    apes = {"attn.compressor.ape", "attn.indexer.compressor.ape"}
    assert kept == mixes | apes | {"attn.attn_sink", "ffn.gate.bias"}


@pytest.mark.parametrize("fused", [False, True])
def test_gather_and_scatter_undo_each_other(fused: bool):
    shapes = {"layers.0.ffn.experts.w1": (3, 2, 5), "layers.0.ffn.experts.w2": (3, 5, 2), "norm.weight": (5,)}
    shapes["layers.0.ffn.experts.w3"] = (3, 2, 5)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    copy = {name: torch.zeros(shape) for name, shape in shapes.items()}
    stored = file_tensors(shapes, lambda _: fused)
    for tensor in stored:
        value = gather(state, tensor)
        assert tuple(value.shape) == tensor.shape
        scatter(copy, tensor, value)
    assert all(torch.equal(copy[name], state[name]) for name in shapes)
    if fused:
        gate_up = gather(state, next(t for t in stored if t.name.endswith("gate_up_proj")))
        assert torch.equal(gate_up[:, :2], state["layers.0.ffn.experts.w1"])  # w1's rows first
    else:
        assert len(stored) == 10


def test_shards_follow_the_published_order():
    cfg = ModelConfig.preset("v4-flash")
    shards = official_shards(file_tensors(model_shapes(cfg), lambda _: False))
    assert len(shards) == 46
    assert [t.name for t in shards[0]] == ["embed.weight"]
    assert all(t.name.startswith("layers.0.") for t in shards[1])
    assert {t.name for t in shards[-2]} == {
        "norm.weight",
        "head.weight",
        "hc_head_fn",
        "hc_head_base",
        "hc_head_scale",
    }
    assert all(t.name.startswith("mtp.0.") for t in shards[-1])


def test_shards_by_size_keep_to_the_limit():
    tensors = file_tensors({f"t{i}": (size,) for i, size in enumerate([4, 4, 9, 1, 2])}, lambda _: False)
    shards = shards_by_size(tensors, lambda t: t.shape[0], 8)
    assert [[t.shape[0] for t in shard] for shard in shards] == [[4, 4], [9], [1, 2]]
