"""Checkpoints exchanged with transformers: it loads what we save, we load what it saves, and logits agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4ForCausalLM

from rorqual import checkpoint
from rorqual.config import ModelConfig
from rorqual.model import Transformer

torch.set_num_threads(1)

# sixteen indexer heads: with few, ReLU makes scores tie at zero and the two top-k rules may differ
CONFIG = ModelConfig.from_dict(
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 4,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 16, 4, 0],
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64},
        "max_position_embeddings": 1024,
        "torch_dtype": "float32",
    }
)
TOKENS = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Random weights large enough that every part matters."""
    built = Transformer(CONFIG, seed=5)
    generator = torch.Generator().manual_seed(6)
    for tensor in built.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return built.eval()


def peer_of(folder: Path) -> tuple[DeepseekV4ForCausalLM, dict[str, Any]]:
    peer, info = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return peer.eval(), info


@torch.no_grad()
def difference(model: Transformer, peer: DeepseekV4ForCausalLM) -> float:
    ours, theirs = model(TOKENS), peer(TOKENS).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_we_save(model: Transformer, tmp_path: Path, shard_bytes: int):
    files = checkpoint.save_transformers(model, tmp_path, shard_bytes=shard_bytes)
    assert (len(files) > 1) == (shard_bytes < 10**9)
    peer, info = peer_of(tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not info.get("error_msgs")
    assert difference(model, peer) < TOLERANCE
    stored = {n for path in files for n in load_file(path)}
    assert any(name.startswith("mtp.0.") for name in stored)  # ours alone reads these


def test_the_bf16_export_is_the_same_rounding(model: Transformer, tmp_path: Path):
    checkpoint.save_transformers(model, tmp_path, dtype=torch.bfloat16)
    peer, info = peer_of(tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(checkpoint.load_transformers(tmp_path), peer) < TOLERANCE


@pytest.mark.parametrize("official_spelling", [False, True])
def test_we_load_what_transformers_saves(model: Transformer, tmp_path: Path, official_spelling: bool):
    """Its native names, and the half-official ones that its `save_pretrained` writes by default."""
    checkpoint.save_transformers(model, tmp_path / "ours")
    peer, _ = peer_of(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs", save_original_format=official_spelling)
    loaded = checkpoint.load_model(tmp_path / "theirs").eval()
    report = loaded.load_report
    assert not (report.missing or report.unexpected or report.misshapen)
    assert difference(loaded, peer) < TOLERANCE
    assert len(loaded.mtp) == 0 and "transformers drops them" in report.notes[0]
    kept = model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items())


def test_real_ratios_travel_in_the_config(tmp_path: Path):
    """With HCA's own 128 the written config keeps DeepSeek's `compress_ratios`."""
    cfg = CONFIG.replace(compress_ratios=(0, 4, 128, 4, 0))
    built = Transformer(cfg, seed=1).eval()
    checkpoint.save_transformers(built, tmp_path)
    peer, _ = peer_of(tmp_path)
    kinds = json.loads((tmp_path / "config.json").read_text())["layer_types"]
    assert peer.config.layer_types == kinds
    assert difference(built, peer) < TOLERANCE


@pytest.mark.parametrize("experts", [None, "fp4", "fp8"])
def test_transformers_loads_what_convert_writes(model: Transformer, tmp_path: Path, experts: Any):
    """From plain and from packed official files, in several shards; it must not take the scales beside for weights."""
    checkpoint.save_official(model, tmp_path / "official", experts=experts)
    done = checkpoint.convert(tmp_path / "official", tmp_path / "out", "transformers", shard_bytes=20_000)
    assert done.verified is not None and done.verified.is_lossless and len(done.files) > 2
    peer, info = peer_of(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert difference(checkpoint.load_official(tmp_path / "official").eval(), peer) < TOLERANCE


def test_convert_reads_what_transformers_saves(model: Transformer, tmp_path: Path):
    checkpoint.save_transformers(model, tmp_path / "ours")
    peer, _ = peer_of(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    checkpoint.convert(tmp_path / "theirs", tmp_path / "official", "official")
    loaded = checkpoint.load_official(tmp_path / "official").eval()
    kept = model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items())
    assert difference(loaded, peer) < TOLERANCE
