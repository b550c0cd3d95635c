"""Checkpoints of later models: those with a DSpark drafter load without it, V4.1 is refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import build, packable_config

from rorqual import checkpoint
from rorqual.cli import main
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError

CONFIG = packable_config()
TOKENS = torch.randint(0, CONFIG.vocab_size, (1, 30), generator=torch.Generator().manual_seed(4))
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The layout of V4-Flash-0731: V4's backbone, three stages of a drafter in `mtp.*`, two more ratios."""
    checkpoint.save_official(build(CONFIG), tmp_path, experts="fp4")
    tensors, hidden = load_file(tmp_path / WEIGHTS), CONFIG.hidden_size
    stage = {name.removeprefix("mtp.0."): tensor for name, tensor in tensors.items() if name.startswith("mtp.0.")}
    for number in range(3):
        tensors |= {f"mtp.{number}.{name}": tensor.clone() for name, tensor in stage.items()}
    tensors["mtp.0.main_proj.weight"] = torch.zeros(hidden, 3 * hidden, dtype=torch.bfloat16)
    tensors["mtp.0.main_norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["mtp.2.markov_head.weight"] = torch.zeros(CONFIG.vocab_size, 8, dtype=torch.bfloat16)
    tensors["mtp.2.confidence_head.weight"] = torch.zeros(1, hidden, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["compress_ratios"] += [0, 0]
    config |= {"num_nextn_predict_layers": 3, "dspark_block_size": 5, "dspark_noise_token_id": 63}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"weights": "fp4"}, {"memory": "64GiB"}])
def test_a_dspark_checkpoint_loads_without_its_drafter(folder: Path, tmp_path_factory, options):
    plain = tmp_path_factory.mktemp("plain")
    checkpoint.save_official(build(CONFIG), plain, experts="fp4")
    dtype = torch.bfloat16
    model = checkpoint.load_official(folder, dtype=dtype, **options).eval()
    theirs = checkpoint.load_official(plain, dtype=dtype, **options).eval()
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), theirs(TOKENS))
    assert len(model.mtp) == 0 and len(theirs.mtp) == 1
    assert model.cfg.compress_ratios == CONFIG.compress_ratios[: CONFIG.num_hidden_layers]
    (note,) = model.load_report.notes
    assert "DSpark drafter of 3 stage(s)" in note and "loaded without it" in note
    assert note in model.load_report.summary() and not model.load_report.unexpected


def test_it_can_be_inspected_and_saved_again(folder: Path, tmp_path_factory, capsys):
    summary = checkpoint.summarise(folder)
    assert summary.fits and summary.note is not None and "DSpark" in summary.note
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(folder), "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["checkpoint"]["note"] == summary.note
    again = tmp_path_factory.mktemp("again")
    checkpoint.save_official(checkpoint.load_official(folder), again, experts="fp4")
    config = json.loads((again / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and not any(key.startswith("dspark") for key in config)
    assert checkpoint.summarise(again).fits and checkpoint.summarise(again).note is None


@pytest.mark.parametrize(
    "values", [{"model_type": "deepseek_v41"}, {"model_type": "x", "text_config": {"model_type": "deepseek_v41_text"}}]
)
def test_v41_is_refused_with_what_differs(folder: Path, values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    for read in (checkpoint.load_official, lambda path: ModelConfig.from_file(path / "config.json")):
        with pytest.raises(ConfigError, match=r"DeepSeek-V4.1 .* share KV .* no hash routing, Engram .* use a V4"):
            read(folder)
