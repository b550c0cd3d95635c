"""Whole models out and in: both layouts, dtypes, strictness, and what the errors say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual import checkpoint
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError, MissingExtraError
from rorqual.model import Transformer

torch.set_num_threads(1)

CONFIG = ModelConfig.from_dict(
    {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 24,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 3,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 128, 0],
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model() -> Transformer:
    built = Transformer(CONFIG, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in built.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
        else:
            assert name.endswith("tid2eid")
            tensor.copy_(torch.randint(0, 6, tensor.shape, generator=generator))
    return built


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    checkpoint.save_official(model, tmp_path)
    return tmp_path


def same(first: Transformer, second: Transformer) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) remove stored tensors; `/` in a keyword stands for the dots of a name."""
    tensors = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        name = key.replace("/", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("shard_bytes", [10**9, 1])
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_round_trip(model: Transformer, tmp_path: Path, layout: str, shard_bytes: int):
    save = getattr(checkpoint, f"save_{layout}")
    files = save(model, tmp_path, shard_bytes=shard_bytes)
    if shard_bytes == 1 and layout == "official":
        assert len(files) == 6  # embedding, three layers, norm and heads, MTP
    assert len(files) == 1 or shard_bytes == 1
    for load in (getattr(checkpoint, f"load_{layout}"), checkpoint.load_model):
        loaded = load(tmp_path)
        assert same(loaded, model)
        assert loaded.cfg.replace(extra={}) == CONFIG
        report = loaded.load_report
        assert not (report.missing or report.unexpected or report.misshapen or report.cast)
        assert report.nbytes == sum(t.nbytes for t in model.state_dict().values())
        assert "missing: none" in report.summary()


def test_official_files_have_official_names(folder: Path):
    stored = load_file(folder / WEIGHTS)
    assert stored["layers.1.ffn.experts.5.w2.weight"].shape == (32, 16)
    assert stored["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    assert "mtp.0.ffn.experts.0.w1.weight" in stored and "layers.2.attn.compressor.ape" in stored
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "deepseek_v4" and config["torch_dtype"] == "float32"


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_bf16_files(model: Transformer, tmp_path: Path, layout: str):
    getattr(checkpoint, f"save_{layout}")(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / WEIGHTS)
    kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert {checkpoint.to_official(n).rsplit(".", 1)[-1] for n in kept} == {
        "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale",
        "hc_head_fn", "hc_head_base", "hc_head_scale", "attn_sink", "ape", "bias",
    }  # fmt: skip
    wide = checkpoint.load_model(tmp_path)  # fp32 on a CPU unless asked otherwise
    assert wide.cfg.torch_dtype == "bfloat16"
    for name, tensor in model.state_dict().items():
        loaded = wide.state_dict()[name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor) or torch.equal(loaded, tensor.bfloat16().float())
    assert set(wide.load_report.cast.values()) == {"bfloat16 -> float32"}
    narrow = checkpoint.load_model(tmp_path, dtype=torch.bfloat16)
    assert narrow.embed.weight.dtype == torch.bfloat16
    assert narrow.state_dict()["layers.0.hc_attn_fn"].dtype == torch.float32
    assert not narrow.load_report.cast
    checkpoint.save_official(narrow, tmp_path / "again")  # None keeps the parameters' own dtype
    assert load_file(tmp_path / "again" / WEIGHTS)["embed.weight"].dtype == torch.bfloat16


def test_only_fp32_and_bf16_are_written(model: Transformer, tmp_path: Path):
    with pytest.raises(ConfigError, match="float32 or bfloat16, but torch.float16"):
        checkpoint.save_official(model, tmp_path, dtype=torch.float16)


def test_companion_files_travel_and_replace_those_of_another_model(model: Transformer, folder: Path, tmp_path: Path):
    (folder / "world.json").write_text('{"world": 7}')
    (folder / "tokenizer.json").write_text("{}")
    loaded = checkpoint.load_official(folder)
    target = tmp_path / "copy"
    checkpoint.save_transformers(loaded, target)
    assert (target / "world.json").read_text() == '{"world": 7}' and (target / "tokenizer.json").exists()
    (target / "world.json").write_text('{"world": 8}')  # another model's
    (target / "generation_config.json").write_text("{}")
    checkpoint.save_transformers(loaded, target)
    assert (target / "world.json").read_text() == '{"world": 7}'
    assert (target / "generation_config.json").exists()  # this model has none: left alone
    checkpoint.save_official(loaded, folder)  # over itself
    assert (folder / "world.json").read_text() == '{"world": 7}'


def test_quantisation_settings_do_not_survive_in_plain_files(tmp_path: Path):
    cfg = CONFIG.replace(extra={"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4", "note": 1})
    checkpoint.save_official(Transformer(cfg), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "expert_dtype" not in config and config["note"] == 1


# ---------------------------------------------------------------- strictness


def test_missing_misshapen_and_unexpected_tensors_are_listed(folder: Path):
    edit(folder, **{
        "layers/0/attn/wq_a/weight": None,
        "layers/1/attn/compressor/wgate/weight": torch.zeros(48, 16),
        "surprise": torch.zeros(2),
    })  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_official(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "1 tensors are missing: layers.0.attn.wq_a.weight (16, 32)" in text
    assert "layers.1.attn.compressor.wgate.weight has shape (48, 16) but this config expects (48, 32)" in text
    assert "1 are unexpected: surprise (2,)" in text
    assert "strict=False" in text


def test_a_loose_load_reports_and_goes_on(model: Transformer, folder: Path):
    edit(
        folder,
        **{"layers/0/attn/wq_a/weight": None, "norm/weight": torch.zeros(3), "surprise": torch.zeros(2)},
    )
    loaded = checkpoint.load_official(folder, strict=False)
    report = loaded.load_report
    assert report.missing == ["layers.0.attn.wq_a.weight"] and report.unexpected == ["surprise"]
    assert [misfit.name for misfit in report.misshapen] == ["norm.weight"]
    assert "missing: layers.0.attn.wq_a.weight" in report.summary() and "(3,)" in report.summary()
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert bool(loaded.state_dict()["layers.0.attn.wq_a.weight"].isfinite().all())


def test_many_names_are_counted_not_poured_out(folder: Path):
    edit(folder, **{f"layers/1/ffn/experts/{e}/w1/weight": None for e in range(6)})
    with pytest.raises(CheckpointError, match=r"(?s)6 tensors are missing: .*, and 1 more.*n_routed_experts"):
        checkpoint.load_official(folder)


def test_a_config_of_another_size_names_shapes(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"q_lora_rank": 8}))
    with pytest.raises(CheckpointError, match=r"wq_a.weight has shape \(16, 32\) but this config expects \(8, 32\)"):
        checkpoint.load_official(folder)


def test_only_mtp_differs(model: Transformer, folder: Path):
    stored = load_file(folder / WEIGHTS)
    without = {name: tensor for name, tensor in stored.items() if not name.startswith("mtp.")}
    save_file(without, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="The file only lacks MTP tensors: correct num_nextn_predict_layers"):
        checkpoint.load_official(folder)


def test_an_integer_table_cannot_be_a_weight(folder: Path):
    edit(folder, **{"norm/weight": torch.ones(32, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="norm.weight is stored as I64 but must be a floating-point weight"):
        checkpoint.load_official(folder)


def test_an_expert_table_must_name_existing_experts(folder: Path):
    edit(folder, **{"layers/0/ffn/gate/tid2eid": torch.full((40, 2), 6)})
    with pytest.raises(CheckpointError, match=r"tid2eid .* names experts 6 to 6, but the model has 6 \(0 to 5\)"):
        checkpoint.load_official(folder)


def test_int32_expert_tables_are_widened(model: Transformer, folder: Path):
    table = model.state_dict()["layers.0.ffn.gate.tid2eid"]
    edit(folder, **{"layers/0/ffn/gate/tid2eid": table.int()})
    loaded = checkpoint.load_official(folder)
    assert same(loaded, model)
    assert loaded.load_report.cast == {"layers.0.ffn.gate.tid2eid": "int32 -> int64"}


def test_two_spellings_of_one_tensor(folder: Path):
    edit(folder, **{"lm_head/weight": torch.zeros(40, 32)})
    with pytest.raises(CheckpointError, match="two spellings of head.weight"):
        checkpoint.load_official(folder)


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (
            {"layers/1/ffn/experts/0/w1/weight": torch.zeros(16, 16, dtype=torch.int8)},
            "is stored as I8 codes, but the file has no layers.1.ffn.experts.0.w1.scale",
        ),
        (
            {
                "layers/1/attn/wq_a/weight": torch.zeros(16, 32).to(torch.float8_e4m3fn),
                "layers/1/attn/wq_a/scale": torch.ones(2, 1),
            },
            r"layers.1.attn.wq_a.weight has scales F32 \(2, 1\), but its fp8 codes need F8_E8M0 .* \(1, 1\)",
        ),
        ({"layers/1/attn/wq_a/scale": torch.ones(1, 1)}, r"1 are unexpected: layers.1.attn.wq_a.scale"),
        (
            {"layers/1/attn/wq_a/weight": torch.zeros(16, 32).to(torch.float8_e5m2)},
            "is stored as F8_E5M2, but packed weights are matrices in F8_E4M3 or I8",
        ),
    ],
)
def test_packed_weights_without_sense_are_refused(folder: Path, packed: dict[str, torch.Tensor], why: str):
    edit(folder, **packed)
    with pytest.raises(CheckpointError, match=why):
        checkpoint.load_official(folder)
    summary = checkpoint.summarise(folder)
    assert summary.is_packed and not summary.fits


def test_a_truncated_checkpoint_is_refused(folder: Path):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(
        CheckpointError, match=f"truncated: {len(whole)} bytes expected, the file has {len(whole) - 100}"
    ):
        checkpoint.load_official(folder)


def test_a_folder_without_config(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoint.load_official(folder)


# ---------------------------------------------------------------- names for rorqual.load


def test_unknown_names_list_what_is_bundled():
    with pytest.raises(CheckpointError, match="there is no model 'nonesuch'.*Bundled models: "):
        checkpoint.load("nonesuch")
    with pytest.raises(CheckpointError, match="no such folder exists"):
        checkpoint.load("./nowhere/at-all")


def test_a_folder_without_tokenizer(folder: Path):
    with pytest.raises(CheckpointError, match="has no tokenizer.json"):
        checkpoint.load(folder)


def test_hub_ids_need_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "rorqual\[hub\]"'):
        checkpoint.load("somebody/some-model")


def test_hub_ids_are_fetched_with_their_revision(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, str | None]] = []

    class FakeHub:
        @staticmethod
        def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((repository, revision))
            if repository == "somebody/absent":
                raise RuntimeError("404")
            return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub)
    assert checkpoint.locate("somebody/some-model@v2") == folder
    assert calls == [("somebody/some-model", "v2")]
    with pytest.raises(CheckpointError, match="could not be fetched from the Hugging Face Hub .*404"):
        checkpoint.locate("somebody/absent")


def test_load_gives_model_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rorqual.tokenizer import train_tokenizer

    model, folder = Transformer(CONFIG.replace(vocab_size=600), seed=3), tmp_path / "folder"
    checkpoint.save_official(model, folder)
    train_tokenizer(["a small text, twice the same: a small text"], 600).save(folder)
    loaded, tokenizer = checkpoint.load(folder)
    assert same(loaded, model) and not loaded.training
    assert tokenizer.decode(tokenizer.encode("a small text")) == "a small text"
    bundled = folder.parent / "assets"
    bundled.mkdir()
    (bundled / "tiny").symlink_to(folder)
    module = sys.modules["rorqual.checkpoint.load"]  # the package's `load` is the function
    monkeypatch.setattr(module, "ASSETS", bundled)
    assert checkpoint.bundled_names() == ["tiny"]
    assert same(checkpoint.load("tiny")[0], model)


# ---------------------------------------------------------------- summaries


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_summary_of_a_folder(model: Transformer, tmp_path: Path, layout: str):
    getattr(checkpoint, f"save_{layout}")(model, tmp_path, dtype=torch.bfloat16)
    summary = checkpoint.summarise(tmp_path)
    assert summary.fits and summary.layout == layout and summary.files == 1 and not summary.is_packed
    assert summary.matching == summary.tensors == len(load_file(tmp_path / WEIGHTS))
    assert set(summary.by_dtype) == {"BF16", "F32", "I64"}
    assert summary.by_dtype["I64"].nbytes == 40 * 2 * 8
    assert sum(share.nbytes for share in summary.by_dtype.values()) == summary.nbytes


def test_summary_of_a_folder_that_does_not_fit(folder: Path):
    edit(folder, **{"norm/weight": None, "surprise": torch.zeros(2), "head/weight": torch.zeros(2, 2)})
    summary = checkpoint.summarise(folder)
    assert not summary.fits
    assert summary.missing == ["norm.weight"] and summary.unexpected == ["surprise"]
    assert str(summary.misshapen[0]) == "head.weight has shape (2, 2) but this config expects (40, 32)"
