"""The list of stored tensors: the published inventories to the byte, and what `save_official` really writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rorqual import checkpoint
from rorqual.cli import main
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.planner import count_parameters, inventory, official_inventory

PUBLISHED = {  # tensors, bytes, stored elements, shards of the released checkpoints
    "v4-flash": (69_187, 159_609_485_896, 158_069_433_298, 46),
    "v4-pro": (145_116, 864_704_792_696, 861_608_274_846, 64),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_inventories(preset: str):
    found = official_inventory(ModelConfig.preset(preset))
    assert (len(found.tensors), found.nbytes, found.elements, len(found.shards)) == PUBLISHED[preset]
    assert len({tensor.name for tensor in found.tensors}) == len(found.tensors)
    for shares in (found.by_component, found.by_dtype):
        assert sum(n for n, _ in shares.values()) == len(found.tensors)
        assert sum(n for _, n in shares.values()) == found.nbytes


def test_shapes_dtypes_and_counts_per_layer():
    found = official_inventory(ModelConfig.preset("v4-flash"))
    by_name = {tensor.name: (tensor.shape, tensor.dtype) for tensor in found.tensors}
    for name, shape, dtype in (
        ("layers.2.attn.wo_a.scale", (64, 32), "F8_E8M0"),
        ("layers.2.attn.indexer.wq_b.weight", (8192, 1024), "F8_E4M3"),
        ("layers.2.ffn.gate.tid2eid", (129280, 6), "I64"),
        ("layers.3.attn.compressor.ape", (128, 512), "F32"),
        ("layers.3.ffn.experts.255.w2.weight", (4096, 1024), "I8"),
        ("layers.3.ffn.experts.255.w2.scale", (4096, 64), "F8_E8M0"),
        ("mtp.0.h_proj.weight", (4096, 4096), "F8_E4M3"),
        ("hc_head_fn", (4, 16384), "F32"),
        ("head.weight", (129280, 4096), "BF16"),
    ):
        assert by_name[name] == (shape, dtype), name
    # window-only, CSA and HCA layers, the MTP module: 29, 40, 33, 39 tensors besides 6 for each of 256 experts
    sizes = [len(shard) - 6 * 256 for shard in (found.shards[1], found.shards[3], found.shards[4], found.shards[-1])]
    assert sizes == [29, 40, 33, 39]


def test_it_is_what_is_written(tmp_path: Path):
    cfg = ModelConfig.preset("minke").replace(vocab_size=64, n_routed_experts=4)
    torch.manual_seed(0)
    model = Transformer(cfg)
    for weights, options in (("official", {"experts": "fp4"}), ("base", {"experts": "fp8"}),
                             ("bf16", {"dtype": torch.bfloat16}), ("fp32", {"dtype": torch.float32})):  # fmt: skip
        checkpoint.save_official(model, tmp_path / weights, **options)
        with safe_open(tmp_path / weights / "model.safetensors", "pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            written = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in pieces.items()}
        found = inventory(cfg, weights)
        assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in found.tensors} == written, weights
    with pytest.raises(ConfigError, match="weights is 'int3'; use one of official, base, bf16, fp32"):
        inventory(cfg, "int3")  # type: ignore[arg-type]


def test_unpacked_it_holds_two_bytes_a_parameter():
    cfg = ModelConfig.preset("v4-flash")
    count, found = count_parameters(cfg), inventory(cfg, "bf16")
    wide = sum(tensor.elements for tensor in found.tensors if tensor.dtype == "F32")
    tables = sum(tensor.nbytes for tensor in found.tensors if tensor.dtype == "I64")
    assert found.nbytes == 2 * count.with_mtp + 2 * wide + tables


def test_inspect_shows_it(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["inspect", "v4-flash", "--json"])
    found = json.loads(capsys.readouterr().out)["official_files"]
    assert (found["tensors"], found["nbytes"], found["elements"], found["shards"]) == PUBLISHED["v4-flash"]
    assert found["by_dtype"]["I64"] == {"tensors": 3, "nbytes": 3 * 129280 * 6 * 8}
    with pytest.raises(SystemExit):
        main(["inspect", "v4-flash"])
    out = capsys.readouterr().out
    for words in ("69,187", "159,609,485,896", "148.65 GiB", "F8_E8M0", "hash tables"):
        assert words in out
