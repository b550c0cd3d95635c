"""Activation checkpointing changes what is kept, never a bit of a gradient."""

import random

import context_cases
import pytest
import small_models
import torch

from rorqual.model import Trace, Transformer
from rorqual.parallel import recompute
from rorqual.train import losses


def deep_model(**changes: object) -> Transformer:
    """Six layers and MTP: groups of two, and one that is not full."""
    ratios = [0, 4, 8, 4, 8]
    cfg = small_models.config(num_hidden_layers=5, compress_ratios=ratios, num_nextn_predict_layers=1, **changes)
    return small_models.build(cfg, weights_seed=3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mhc", "block"])
def test_same_bits(mode: recompute.Mode, dtype: torch.dtype | None) -> None:
    model = deep_model()
    model.compute_dtype = dtype
    for case in context_cases.cases()[: 5 if dtype is None else 2]:
        recompute.install(model, "none")
        expected = context_cases.step(model, case)
        recompute.install(model, mode)
        found = context_cases.step(model, case)
        assert str(found["parts"]) == str(expected["parts"])  # as text: a recall may be nan
        for name, gradient in expected["gradients"].items():
            assert torch.equal(found["gradients"][name], gradient), f"{name} differs with recompute={mode}"


@pytest.mark.parametrize("mode", ["mhc", "block"])
@pytest.mark.parametrize("residual", ["plain", "hc"])
def test_other_residual_paths(mode: recompute.Mode, residual: str) -> None:
    model = deep_model(residual=residual, **({"hc_mult": 1} if residual == "plain" else {}))
    case = context_cases.cases()[1]
    expected = context_cases.step(model, case)
    recompute.install(model, mode)
    found = context_cases.step(model, case)
    for name, gradient in expected["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), f"{name} differs with recompute={mode}"


def test_choices_do_not_flip() -> None:
    """The backward pass sees a router and an indexer that would now choose otherwise, and keeps to the first choice."""
    model = deep_model()
    rows = context_cases.cases()[4].rows
    gradients = []
    for disturb in (False, True):
        recompute.install(model, "block")
        model.zero_grad()
        streams = model.forward_streams(rows.tokens, trace=Trace(router=True, index_loss=True))
        selects = [layer.attn.indexer for layer in model.layers if layer.attn.indexer is not None]
        if disturb:
            for layer in model.layers:
                if not layer.spec.hash_routed:
                    layer.ffn.gate.bias.neg_()
            for indexer in selects:
                indexer.select = None  # asking again would fail
        streams.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def kept_bytes(mode: recompute.Mode, dtype: torch.dtype | None) -> int:
    """What a forward pass allocates and does not give back before the backward pass."""
    cfg = small_models.config(
        num_hidden_layers=8, compress_ratios=[0, 0, 4, 8, 4, 8, 4, 8], hidden_size=256, q_lora_rank=32
    )
    model = small_models.build(cfg)
    recompute.install(model, mode)
    model.compute_dtype = dtype
    rows = context_cases.plain_rows(random.Random(0), 1, 128, padding=False)
    weights = losses.LossWeights(0, 0.01, 1.0, 127, 1, row_share=1.0, index_share=1.0)
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        loss, _ = losses.compute(model, rows, weights, dense=False)
    assert loss.requires_grad  # and is alive, with all it needs
    return sum(event.self_cpu_memory_usage for event in profile.function_events)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory(dtype: torch.dtype | None) -> None:
    everything, streams, blocks = kept_bytes("none", dtype), kept_bytes("mhc", dtype), kept_bytes("block", dtype)
    assert streams < 0.6 * everything, f"mhc keeps {streams} of {everything} bytes"
    assert blocks < 0.35 * everything, f"block keeps {blocks} of {everything} bytes"


def test_no_gradients_no_recompute() -> None:
    model = deep_model()
    recompute.install(model, "mhc")
    tokens = small_models.some_tokens(model, 1, 20)
    expected = small_models.full(deep_model(), tokens[0])
    assert torch.equal(small_models.full(model, tokens[0]), expected)
    state = model.new_state(1)
    with torch.no_grad():
        steps = torch.cat([model(tokens[:, :7], state=state), model(tokens[:, 7:], state=state)], 1)
    assert small_models.gap(steps[0], expected) < small_models.TOLERANCE


def test_group_size() -> None:
    cfg = small_models.config(num_hidden_layers=61, compress_ratios=[0] * 61)
    assert recompute.layers_a_group(cfg) == 6  # sqrt(4 * 61 / 6) = 6.4
