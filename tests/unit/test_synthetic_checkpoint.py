"""The checkpoint that `benchmarks/streaming.py` runs: the released layout, finite numbers, bounded memory groups."""

import sys
from pathlib import Path

import pytest
import torch
from small_models import packable_config

from rorqual import checkpoint
from rorqual.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import memory_limit
import synthetic_checkpoint


@pytest.mark.parametrize("memory", [None, "64GiB"])
def test_it_is_a_packed_checkpoint_with_finite_logits(tmp_path: Path, memory):
    config = packable_config()
    plain = ModelConfig.from_dict(config.to_dict() | {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 8]})
    nbytes = synthetic_checkpoint.write(tmp_path, plain)
    summary = checkpoint.summarise(tmp_path)
    assert summary.fits and summary.is_packed and summary.layout == "official" and summary.nbytes == nbytes
    model = checkpoint.load_official(tmp_path, weights="fp4", memory=memory, dtype=torch.float32).eval()
    tokens = torch.arange(60)[None]
    with torch.inference_mode():
        logits = model(tokens)
    assert bool(logits.isfinite().all()) and 0.2 < logits.std() < 5
    table = model.layers[0].ffn.gate.tid2eid
    assert all(len(set(row)) == len(row) for row in table.tolist())


def test_flash_cut_to_four_layers():
    config = synthetic_checkpoint.flash_config()
    flash = ModelConfig.preset("v4-flash")
    assert [spec.kind for spec in config.layers] == ["sliding", "csa", "hca", "csa"]
    assert [spec.hash_routed for spec in config.layers] == [True, True, True, False]
    for name in ("hidden_size", "n_routed_experts", "moe_intermediate_size", "vocab_size", "num_experts_per_tok"):
        assert getattr(config, name) == getattr(flash, name)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_in_both_kinds_of_groups(tmp_path: Path, monkeypatch, version: int):
    """Without the rights there is no group but a reason; with them the limit stands where the kernel reads it."""
    monkeypatch.setattr(memory_limit, "ROOT", tmp_path)
    monkeypatch.setattr(memory_limit, "_own_group", lambda: tmp_path / "mine")
    limit, why = memory_limit.Limit.make(1000)
    assert limit is None and "cannot be made" in why
    (tmp_path / "memory").mkdir()
    (tmp_path / "mine").mkdir()
    if version == 2:
        (tmp_path / "cgroup.controllers").touch()
    limit, why = memory_limit.Limit.make(1000)
    assert limit is not None and not why
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    assert (limit.folder / name).read_text() == "1000" and limit.peak() is None
    assert limit.folder.parent == tmp_path / ("mine" if version == 2 else "memory")
