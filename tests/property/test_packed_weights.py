"""Weights that stay packed: the same bits however a sequence is cut, the numbers that training simulates, and files
whose codes are never unpacked.
"""

from pathlib import Path

import pytest
import torch
from small_models import build, config, packable_config, some_tokens

from rorqual import checkpoint
from rorqual.checkpoint import load_model
from rorqual.engine.store import store_fingerprint
from rorqual.errors import ConfigError
from rorqual.model import Segment, Transformer, quantised
from rorqual.model.packed_weights import WEIGHTS, pack_weights, packed
from rorqual.ops.native import load
from rorqual.ops.packed_weight import from_codes

needs_native = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def model_of(weights: str, dtype: torch.dtype = torch.float32, cache_format: str = "exact") -> Transformer:
    model = build(config(index_topk=5, cache_format=cache_format)).to(dtype)
    pack_weights(model, weights)
    return model


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cuts_and_batches(weights: str, dtype: torch.dtype) -> None:
    """One call, chunks, single tokens of the fused step and neighbours in a batch agree bit by bit."""
    model = model_of(weights, dtype, "fp8" if weights == "fp4" else "exact")
    row, state, other = some_tokens(model, 1, 75), model.new_state(), model.new_state()
    whole = model.forward_streams(row)
    parts = row.split([30, 3, 7, *[1] * 35], 1)
    assert torch.equal(torch.cat([model.forward_streams(part, state=state) for part in parts], 1), whole)
    assert state.decoding is not None  # the fused step ran
    neighbour = Segment(model.new_state(), some_tokens(model, 9))
    found = model.step([neighbour, Segment(other, row[0])])
    assert torch.equal(found[:, 9:], whole)


@needs_native
@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_the_numbers_of_training(experts: str) -> None:
    """Packed weights are those that quantisation-aware training computes with; only sums are ordered otherwise."""
    simulated, model, plain = (build(packable_config()) for _ in range(3))
    quantised.quantise(simulated, experts)  # type: ignore[arg-type]
    pack_weights(model, experts)
    values = dict(packed(model))
    assert len(values) > 20
    for name, weight in values.items():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(weight.dequantise(), getattr(simulated.get_submodule(module), leaf)), name
        plain.get_parameter(name).copy_(weight.dequantise())
    tokens = some_tokens(model, 2, 30)
    assert (model(tokens) - plain(tokens)).abs().max() < 1e-3


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_packed_files_are_never_unpacked(experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales of an official file are the model's, byte by byte."""
    checkpoint.save_official(build(packable_config()), tmp_path, experts=experts)  # type: ignore[arg-type]
    plain = load_model(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("codes were unpacked")

    monkeypatch.setattr("rorqual.checkpoint.report.unpack", refuse)
    monkeypatch.setattr("rorqual.checkpoint.collector.unpack", refuse)
    model = load_model(tmp_path, weights=experts)
    for name, weight in packed(model):
        assert torch.equal(weight.dequantise(), plain.get_parameter(name)), name
    with checkpoint.CheckpointFiles(tmp_path) as files:
        name = "layers.1.ffn.experts.3.w2"
        stored = from_codes(files.read(f"{name}.weight"), files.read(f"{name}.scale"))
    held = model.layers[1].ffn.experts.w2[3]
    assert torch.equal(held.codes, stored.codes) and torch.equal(held.scale, stored.scale)
    tokens = some_tokens(model, 1, 30)
    assert (model(tokens) - plain(tokens)).abs().max() < 1e-3
    assert sum(p.nbytes for p in model.parameters()) < sum(p.nbytes for p in plain.parameters()) / 2


@pytest.mark.parametrize("weights", WEIGHTS)
def test_other_files_are_packed_as_they_are_read(weights: str, tmp_path: Path) -> None:
    """From fp32 files of either layout, and from FP4 files whose codes do not fit the choice."""
    model = build(packable_config())
    for folder, save in (("official", checkpoint.save_official), ("theirs", checkpoint.save_transformers)):
        save(model, tmp_path / folder)
        loaded = load_model(tmp_path / folder, weights=weights)
        again = load_model(tmp_path / folder)
        pack_weights(again, weights)
        assert {n: w.format for n, w in packed(loaded)} == {n: w.format for n, w in packed(again)}
        assert torch.equal(loaded(some_tokens(model, 1, 20)), again(some_tokens(model, 1, 20)))
    checkpoint.save_official(model, tmp_path / "packed", experts="fp4")
    assert {w.format for _, w in packed(load_model(tmp_path / "packed", weights=weights))} == set(WEIGHTS[weights])


def test_what_packed_models_refuse(tmp_path: Path) -> None:
    """Saving and packing again are refused, unknown choices too; and stored state knows the difference."""
    model, plain = model_of("int8"), build(config(index_topk=5, cache_format="exact"))
    assert store_fingerprint(model) != store_fingerprint(plain)
    assert store_fingerprint(model) != store_fingerprint(model_of("fp8"))
    with pytest.raises(ConfigError, match="cannot be saved"):
        checkpoint.save_official(model, tmp_path)
    with pytest.raises(ConfigError, match="packed again"):
        pack_weights(model, "int8")
    with pytest.raises(ConfigError, match="weights is 'fp2'"):
        pack_weights(plain, "fp2")
    with pytest.raises(ConfigError, match="weights is 'fp2'"):
        load_model(Path(__file__).parents[2] / "rorqual" / "assets" / "minke", weights="fp2")
