"""Base checkpoints: routed experts in FP8 with FP32 scales, no `expert_dtype`; loaded unpacked, packed and streamed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import build, packable_config
from torch import Tensor

from rorqual import checkpoint
from rorqual.checkpoint import MemoryBudget
from rorqual.model.packed_weights import packed
from rorqual.ops import quant

CONFIG = packable_config()
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 24), generator=torch.Generator().manual_seed(6))
WEIGHTS = "model.safetensors"
STREAMED = {"memory": MemoryBudget(cache=1 << 19)}


def scales_of_experts(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if ".experts." in name and name.endswith(".scale")]


@pytest.fixture(params=["fp32", "e8m0", "no power of two"])
def folder(request, tmp_path: Path) -> Path:
    """The base checkpoints' form, the released projections' form for experts too, and scales that e8m0 cannot hold."""
    checkpoint.save_official(build(CONFIG), tmp_path, experts="fp8")
    assert "expert_dtype" not in json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    names = scales_of_experts(tensors)
    assert names and all(tensors[name].dtype == torch.float32 for name in names)
    for number, name in enumerate(names):
        if request.param == "e8m0":
            tensors[name] = quant.encode_e8m0(tensors[name])
        elif request.param != "fp32":
            tensors[name] = tensors[name] * (1 + number / 1000)
    save_file(tensors, tmp_path / WEIGHTS)
    return tmp_path


@torch.inference_mode()
def test_numbers_are_codes_times_scales(folder: Path):
    tensors, model = load_file(folder / WEIGHTS), checkpoint.load_official(folder)
    whole = dict(packed(checkpoint.load_official(folder, weights="fp8")))
    for name in scales_of_experts(tensors):
        stack, expert, matrix = name.removesuffix(".scale").rsplit(".", 2)
        codes, scale = tensors[f"{stack}.{expert}.{matrix}.weight"], tensors[name]
        factors = scale if scale.dtype == torch.float32 else quant.decode_e8m0(scale)
        out, width = codes.shape
        blocks = factors.repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :width]
        wanted = codes.float() * blocks
        assert torch.equal(model.state_dict()[f"{stack}.{matrix}"][int(expert)], wanted)
        assert torch.equal(whole[f"{stack}.{matrix}"][int(expert)].dequantise(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_and_streamed_models_answer_as_the_unpacked_one(folder: Path, dtype):
    plain = checkpoint.load_official(folder, dtype=dtype).eval()(TOKENS)
    kept = checkpoint.load_official(folder, dtype=dtype, weights="fp8").eval()(TOKENS)
    streamed = checkpoint.load_official(folder, dtype=dtype, **STREAMED).eval()
    assert {weight.format for _, weight in packed(streamed)} == {"fp8"} and streamed.expert_cache.reader.kind == "fp8"
    assert torch.equal(streamed(TOKENS), kept)
    assert (kept - plain).abs().max() < (1e-4 if dtype == torch.float32 else 0.5)
    other = checkpoint.load_official(folder, dtype=dtype, weights="fp4").eval()(TOKENS)
    again = checkpoint.load_official(folder, dtype=dtype, weights="fp4", **STREAMED).eval()(TOKENS)
    assert torch.equal(other, again) and not torch.equal(other, kept)
