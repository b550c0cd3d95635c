"""FP8 and FP4 files: bytes by hand, what a folder holds, the same logits after loading, byte-exact round trips."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import build, packable_config
from torch import Tensor

from rorqual import checkpoint
from rorqual.errors import ConfigError
from rorqual.model import Transformer, quantised
from rorqual.ops import quant
from rorqual.train.microbatch import precision

torch.set_num_threads(1)

CONFIG = packable_config()
TOKENS = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(2))
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG)


def simulated(experts: str, rounding: str = "v4") -> Transformer:
    """A model in quantisation-aware training."""
    model = build(CONFIG)
    quantised.quantise(model, experts)
    quantised.round_activations(model, rounding)
    return model


def files_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_bytes_of_experts_and_projections_by_hand(tmp_path: Path):
    model = build(CONFIG)
    with torch.no_grad():
        w1 = model.layers[0].ffn.experts.w1
        w1.zero_()
        # groups of 32 channels: values 0.5 -1 6 0 3 -4 1.5 2 at scale 2 (6.5 * 2 rounds to 6 * 2), then amax 0.75
        w1[4, 2, :8] = torch.tensor([1.1, -2.0, 12.0, 0.2, 6.0, -7.9, 3.0, 4.0])
        w1[4, 2, 32:34] = torch.tensor([0.75, -0.25])
        wq_a = model.layers[0].attn.wq_a.weight
        wq_a.zero_()
        wq_a[0, :3] = torch.tensor([1.0, 0.3, -0.26])  # scale 2^-8: 256, 76.8 -> 80, -66.56 -> -64
        wq_a[0, 130] = 449.0  # another block, scale 2: 224.5 -> 224
    checkpoint.save_official(model, tmp_path, experts="fp4")
    tensors = load_file(tmp_path / WEIGHTS)
    codes, scale = tensors["layers.0.ffn.experts.4.w1.weight"], tensors["layers.0.ffn.experts.4.w1.scale"]
    assert codes.dtype == torch.int8 and codes.shape == (96, 80)
    assert scale.dtype == torch.float8_e8m0fnu and scale.shape == (96, 5)
    # low nibble first: (0.5, -1) = 1 | 10 << 4; (6, 0) = 7; (3, -4) = 5 | 14 << 4; (1.5, 2) = 3 | 4 << 4; (6, -2)
    assert list(raw(codes[2])[:4]) == [0xA1, 0x07, 0xE5, 0x43] and list(raw(codes[2])[16:17]) == [0xC7]
    assert list(raw(scale[2])[:2]) == [128, 124]  # 2^1, 2^-3
    assert list(raw(scale[2])[2:4]) == [117, 117]  # groups of zeros: not below 2^1 / 2^11
    codes, scale = tensors["layers.0.attn.wq_a.weight"], tensors["layers.0.attn.wq_a.scale"]
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (1, 2)
    assert list(raw(scale)) == [127 - 8, 128]
    assert codes[0, [0, 1, 2, 130]].float().tolist() == [256.0, 80.0, -64.0, 224.0]
    assert list(raw(codes[0, 130:131])) == [0x76]  # 224 = 2^7 * 1.75: exponent 14, mantissa 6


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_a_folder_holds_what_the_released_ones_hold(model: Transformer, tmp_path: Path, experts):
    written = checkpoint.save_official(model, tmp_path, experts=experts, shard_bytes=1000)
    assert len(written) == 1 + 3 + 1 + 1  # embedding, layers, norm and head, MTP
    tensors = files_of(tmp_path)
    for name, tensor in tensors.items():
        weight = name.removesuffix("scale") + "weight" if name.endswith(".scale") else name
        kind = quantised.stored_format(weight, experts)
        is_expert = ".experts." in name
        if name.endswith(".scale"):
            assert tensor.dtype == (torch.float32 if experts == "fp8" and is_expert else torch.float8_e8m0fnu), name
        elif name.endswith("tid2eid"):
            assert tensor.dtype == torch.int64
        else:
            dtypes = {"fp4": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
            assert tensor.dtype == dtypes[kind], name
            assert (name.removesuffix("weight") + "scale" in tensors) == (kind in ("fp4", "fp8")), name
    # tensors per layer as in the released checkpoints: window 29 + 6E, HCA 33 + 6E, CSA 40 + 6E, MTP 39 + 6E, top 6
    count = {prefix: sum(name.startswith(prefix) for name in tensors) for prefix in ("layers.", "mtp.0.")}
    assert count == {"layers.": 29 + 40 + 33 + 3 * 6 * 6, "mtp.0.": 39 + 6 * 6}
    assert len(tensors) == sum(count.values()) + 6
    written_config = json.loads((tmp_path / "config.json").read_text())
    assert written_config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    assert written_config.get("expert_dtype") == ("fp4" if experts == "fp4" else None)
    assert written_config["torch_dtype"] == "bfloat16"
    summary = checkpoint.summarise(tmp_path)
    assert summary.fits and summary.is_packed and summary.matching == len(checkpoint_names(model))


def checkpoint_names(model: Transformer) -> list[str]:
    """Official names of a model's unpacked tensors."""
    experts = CONFIG.n_routed_experts
    return [name for key in model.state_dict() for name in ([key] * experts if ".experts.w" in key else [key])]


@pytest.mark.parametrize("rounding", ["v4", "v4-inputs"])
@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_loaded_logits_are_the_simulated_ones(tmp_path: Path, experts, rounding):
    trained = simulated(experts, rounding)
    checkpoint.save_official(trained, tmp_path, experts=experts)
    loaded = checkpoint.load_official(tmp_path)
    assert loaded.cfg.activation_rounding == rounding and not quantised.is_quantised(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), trained(TOKENS))
        mine, theirs = trained.new_state(2), loaded.new_state(2)
        for i in range(12):
            token = TOKENS[:, i : i + 1]
            assert torch.equal(trained(token, state=mine), loaded(token, state=theirs))
    with precision(trained, torch.bfloat16), precision(loaded, torch.bfloat16), torch.no_grad():
        assert torch.equal(loaded(TOKENS), trained(TOKENS))
    report = loaded.load_report
    kinds = {kind.split(" ")[0] for kind in report.cast.values()}
    assert kinds == ({"fp4", "fp8", "bfloat16"} if experts == "fp4" else {"fp8", "bfloat16"})
    assert not report.missing and not report.unexpected


def test_loaded_in_bf16_the_weights_are_still_exact(tmp_path: Path):
    trained = simulated("fp4")
    checkpoint.save_official(trained, tmp_path, experts="fp4")
    loaded = checkpoint.load_official(tmp_path, dtype=torch.bfloat16)
    used = quantised.used_values(trained)
    assert all(torch.equal(loaded.state_dict()[name].float(), value) for name, value in used.items())
    plain = Transformer(trained.cfg, seed=None).eval()
    plain.load_state_dict({**trained.state_dict(), **used})
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), plain.to(torch.bfloat16)(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_files_hold_the_simulated_values_too(tmp_path: Path, dtype):
    trained = simulated("fp4")
    checkpoint.save_official(trained, tmp_path, dtype=dtype)
    loaded = checkpoint.load_official(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), trained(TOKENS))
    checkpoint.save_transformers(trained, tmp_path / "other", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_transformers(tmp_path / "other")(TOKENS), trained(TOKENS))


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_reading_and_writing_changes_no_byte(model: Transformer, tmp_path: Path, experts):
    checkpoint.save_official(model, tmp_path / "a", experts=experts)
    loaded = checkpoint.load_official(tmp_path / "a")
    checkpoint.save_official(loaded, tmp_path / "b", experts=experts)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    # without the scales that were read, other scales may hold the same numbers
    loaded.load_report.scales.clear()
    checkpoint.save_official(loaded, tmp_path / "c", experts=experts)
    again = checkpoint.load_official(tmp_path / "c")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_scales_that_no_longer_fit_are_not_kept(model: Transformer, tmp_path: Path):
    checkpoint.save_official(model, tmp_path / "a", experts="fp4")
    loaded = checkpoint.load_official(tmp_path / "a")
    with torch.no_grad():
        loaded.layers[1].ffn.experts.w1.mul_(3.3)
    checkpoint.save_official(loaded, tmp_path / "b", experts="fp4")
    again = checkpoint.load_official(tmp_path / "b").layers[1].ffn.experts.w1
    packed, scale = quant.quantize_weight_fp4(loaded.layers[1].ffn.experts.w1.detach())
    assert torch.equal(again, quant.dequantize_weight_fp4(packed, scale))


def test_the_format_is_read_from_the_tensors_not_from_the_config(model: Transformer, tmp_path: Path):
    """The April file of V4-Flash names no expert_dtype; mixed files load as well."""
    checkpoint.save_official(model, tmp_path / "fp4", experts="fp4")
    checkpoint.save_official(model, tmp_path / "fp8", experts="fp8")
    described = json.loads((tmp_path / "fp4" / "config.json").read_text())
    del described["expert_dtype"], described["activation_rounding"]
    (tmp_path / "fp4" / "config.json").write_text(json.dumps(described))
    other = load_file(tmp_path / "fp8" / WEIGHTS)
    tensors = load_file(tmp_path / "fp4" / WEIGHTS)
    tensors |= {name: tensor for name, tensor in other.items() if name.startswith("layers.2.")}
    tensors["layers.1.attn.wq_b.scale"] = quant.decode_e8m0(tensors["layers.1.attn.wq_b.scale"])
    save_file(tensors, tmp_path / "fp4" / WEIGHTS)
    loaded = checkpoint.load_official(tmp_path / "fp4")
    assert loaded.cfg.activation_rounding == "v4"  # what files with a quantization_config expect
    for name, experts in (("layers.1.ffn.experts.w2", "fp4"), ("layers.2.ffn.experts.w2", "fp8")):
        expected = quantised.rounded_weight(model.state_dict()[name], experts)
        assert torch.equal(loaded.state_dict()[name], expected)


def test_packed_and_a_dtype_contradict_each_other(model: Transformer, tmp_path: Path):
    with pytest.raises(ConfigError, match="dtype torch.bfloat16 and experts in fp4 were both asked for"):
        checkpoint.save_official(model, tmp_path, dtype=torch.bfloat16, experts="fp4")
