"""`rorqual inspect`: figures for machines, tables for people, exit codes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual import checkpoint
from rorqual.cli import main
from rorqual.cli.inspect import short, spans
from rorqual.config import ModelConfig
from rorqual.model import Transformer

torch.set_num_threads(1)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cfg = ModelConfig.preset("minke").replace(vocab_size=64, n_routed_experts=4)
    checkpoint.save_official(Transformer(cfg), tmp_path, dtype=torch.bfloat16)
    return tmp_path


def test_preset_for_machines(capsys: pytest.CaptureFixture[str]):
    code, out, _ = inspect(capsys, "v4-flash", "--json")
    found = json.loads(out)
    assert code == 0 and found["source"] == "preset"
    assert found["parameters"]["total"] == 284_332_240_471
    assert found["parameters"]["activated"] == 13_270_101_591
    assert found["parameters"]["with_mtp"] == 290_942_289_362
    assert found["parameters"]["by_component"]["wkv"] == 90_177_536
    assert len(found["layers"]) == 43
    assert found["layers"][2] == {"index": 2, "kind": "csa", "compress_ratio": 4, "routing": "hash"}
    assert found["mtp_layers"][0]["kind"] == "sliding"
    assert found["config"]["index_topk"] == 512


def test_preset_for_people(capsys: pytest.CaptureFixture[str]):
    code, out, _ = inspect(capsys, "v4-flash")
    assert code == 0
    for words in ("284.33 B", "13.27 B", "2 to 42 by 2", "0 to 2", "6 of 256"):
        assert words in out


def test_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ModelConfig.preset("minke").to_dict()))
    code, out, _ = inspect(capsys, str(path), "--json")
    assert code == 0 and json.loads(out)["source"] == "file" and "checkpoint" not in json.loads(out)


def test_a_checkpoint_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = inspect(capsys, str(folder), "--json")
    found = json.loads(out)["checkpoint"]
    assert code == 0 and found["fits"] and found["layout"] == "official" and not found["missing"]
    assert found["by_dtype"].keys() == {"BF16", "F32", "I64"}
    code, out, _ = inspect(capsys, str(folder))
    assert code == 0 and "BF16" in out and "missing" in out


def test_weights_that_do_not_fit_end_with_one(folder: Path, capsys: pytest.CaptureFixture[str]):
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors | {"surprise": torch.zeros(2)}, folder / "model.safetensors")
    code, out, _ = inspect(capsys, str(folder), "--json")
    found = json.loads(out)["checkpoint"]
    assert code == 1 and found["missing"] == ["norm.weight"] and found["unexpected"] == ["surprise"]
    code, out, _ = inspect(capsys, str(folder))
    assert code == 1 and "norm.weight" in out and "surprise" in out


def test_a_truncated_file_ends_with_one(folder: Path, capsys: pytest.CaptureFixture[str]):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = inspect(capsys, str(folder))
    assert code == 1 and "truncated" in err and "Copy or download the file again" in err


def test_bad_input_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = inspect(capsys, "nonesuch")
    assert code == 2 and "nothing called 'nonesuch'" in err and "v4-flash" in err
    code, _, err = inspect(capsys, "")
    assert code == 2 and "the name is empty" in err
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ModelConfig.preset("minke").to_dict() | {"num_experts_per_tok": 99}))
    code, _, err = inspect(capsys, str(path))
    assert code == 2 and "num_experts_per_tok 99" in err


@pytest.mark.parametrize(
    ("indices", "words"),
    [([0], "0"), ([0, 1], "0, 1"), ([0, 1, 3, 5, 7], "0, 1 to 7 by 2"), ([2, 3, 4, 9], "2 to 4, 9")],
)
def test_spans(indices: list[int], words: str):
    assert spans(indices) == words


def test_short_numbers():
    assert [short(n) for n in (7, 68_800, 13_270_101_591, 1_572_997_201_763)] == [
        "7",
        "68.80 k",
        "13.27 B",
        "1.57 T",
    ]


def test_a_dtype_that_no_load_takes_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]):
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].long()
    save_file(tensors, folder / "model.safetensors")
    code, out, _ = inspect(capsys, str(folder), "--json")
    found = json.loads(out)["checkpoint"]
    assert code == 1 and not found["fits"]
    assert found["misshapen"] == ["norm.weight is stored as I64 but must be a floating-point weight"]
