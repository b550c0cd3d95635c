"""Health figures against direct computation, and where they end up."""

import math
from pathlib import Path

import pytest
import torch
from tiny_run import records, tiny_config, tiny_run
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.model import Layout, Trace, Transformer
from rorqual.model.health import figure, keep_figure, watch_clamp, watch_composite, watch_mix, watch_router
from rorqual.ops.experts import router_scores
from rorqual.ops.hyper_connections import sinkhorn
from rorqual.parallel.mesh import Mesh
from rorqual.train import losses, monitors
from rorqual.train.feed import Rows
from rorqual.train.groups import Assigned, Role
from rorqual.train.muon import Muon

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("chunk", [3, 100])
def test_z_comes_with_the_cross_entropy(chunk: int) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 8, generator=draw), torch.randn(19, 8, generator=draw)
    labels = torch.randint(0, 19, (11,), generator=draw)
    labels[2:5] = losses.IGNORE
    found: list[Tensor] = []
    losses.cross_entropy_sum(hidden, weight, labels, chunk=chunk, z_figures=found)
    z = (hidden @ weight.T).logsumexp(-1)[labels != losses.IGNORE]
    expected = torch.stack([z.sum(), torch.tensor(8.0), z.max(), z.square().sum()])
    torch.testing.assert_close(found[0], expected)


def test_z_loss_has_the_gradient_of_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=draw).requires_grad_()
    weight = torch.randn(19, 8, generator=draw).requires_grad_()
    labels = torch.randint(0, 19, (11,), generator=draw)
    labels[2:5] = losses.IGNORE
    found = losses.cross_entropy_sum(hidden, weight, labels, chunk=4, z_weight=0.1)
    (found * 0.3).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    z = logits.logsumexp(-1)[labels != losses.IGNORE]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + 0.1 * z.square().sum()
    (expected * 0.3).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, (hidden.grad, weight.grad))


def test_composed_mixes_amplify_by_their_row_and_column_sums() -> None:
    draw = torch.Generator().manual_seed(0)
    trace, probe = Trace(health=True), torch.arange(6)
    product = torch.eye(4).expand(6, 4, 4)
    for depth in range(100):  # bounded however deep: acceptance test 9
        comb = sinkhorn(torch.randn(2, 3, 4, 4, generator=draw) * 2, 20, 1e-6)
        post = torch.full((2, 3, 4), 1.5)
        watch_mix(trace, f"layers.{depth}.attn", post, comb, probe, is_trunk=True)
        mix = comb.flatten(0, 1).transpose(1, 2)
        product = mix @ product
        diagonal, error = trace.figures[f"mix_diagonal/layers.{depth}.attn"], (mix.sum(1) - 1).abs().max()
        torch.testing.assert_close(diagonal[0] / diagonal[1], mix.diagonal(dim1=1, dim2=2).mean())
        torch.testing.assert_close(trace.figures[f"mix_column_error/layers.{depth}.attn"][2], error)
        assert trace.figures[f"mix_post/layers.{depth}.attn"].tolist() == [36.0, 24.0, 1.5]
        assert (mix.sum(2) - 1).abs().max() < 1e-5
    watch_composite(trace)
    torch.testing.assert_close(trace.figures["gain_forward"][2], product.sum(2).max())
    torch.testing.assert_close(trace.figures["gain_backward"][2], product.sum(1).max())
    assert trace.figures["gain_forward"][2] <= 1.01
    # Unconstrained mixes do amplify: twice the identity, ten times over.
    loose = Trace(health=True)
    for depth in range(10):
        watch_mix(loose, str(depth), torch.zeros(1, 1, 4), -2 * torch.eye(4).view(1, 1, 4, 4), probe[:1], is_trunk=True)
    watch_composite(loose)
    assert loose.figures["gain_forward"][2] == 1024


def test_router_logits_are_found_again_from_their_scores() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 8, generator=draw) * 3, torch.randn(5, 8, generator=draw)
    trace = Trace()
    watch_router(trace, "a", router_scores(x, weight), torch.arange(9))
    logits = x @ weight.T
    torch.testing.assert_close(trace.figures["router_logit/a"][2], logits.max())
    torch.testing.assert_close(trace.figures["router_z/a"][0] / 9, logits.logsumexp(-1).mean(), rtol=1e-4, atol=1e-4)


def test_clamped_inputs_are_counted_as_they_are_clamped() -> None:
    draw = torch.Generator().manual_seed(0)
    x, experts = torch.randn(20, 8, generator=draw), torch.randint(0, 3, (20, 1), generator=draw)
    w1, w3 = torch.randn(3, 6, 8, generator=draw), torch.randn(3, 6, 8, generator=draw)
    trace = Trace()
    watch_clamp(trace, "a", x, experts, w1, w3, 2.0, torch.arange(20))
    gate = torch.stack([w1[e] @ t for t, e in zip(x, experts[:, 0], strict=True)])
    up = torch.stack([w3[e] @ t for t, e in zip(x, experts[:, 0], strict=True)])
    hits = (gate > 2).sum() + (up.abs() > 2).sum()
    assert trace.figures["clamp/a"][:2].tolist() == [hits, 240.0] and hits > 50
    watch_clamp(trace, "off", x, experts, w1, w3, 0.0, torch.arange(20))
    assert "clamp/off" not in trace.figures


def test_figures_of_parts_merge_to_that_of_the_whole() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    trace = Trace()
    for part in values.split(13):
        keep_figure(trace, "a", figure(part))
    torch.testing.assert_close(trace.figures["a"], figure(values))


def test_the_probe_leaves_padding_out_and_is_spread_evenly() -> None:
    trace = Trace()
    layout = Layout(2, 1000, torch.device("cpu"), lengths=[1000, 3])
    probe = trace.probe(layout)
    assert len(probe) <= 256 and probe.max() < 1003 and (probe.diff() == 4).all()


def model_and_rows() -> tuple[Transformer, Rows]:
    model = Transformer(tiny_config(Path("unused")).model.build(), seed=0)
    tokens = torch.randint(0, 48, (2, 32), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(tokens, losses.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    return model, Rows(tokens, labels)


def test_watching_changes_no_bit() -> None:
    model, rows = model_and_rows()
    found = []
    for watch in (False, True):
        model.zero_grad()
        weights = losses.LossWeights(0.3, 1e-2, 1.0, 62, 60, 1.0, 1.0, watch=watch)
        loss, parts = losses.compute(model, rows, weights, dense=False)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}, parts))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert (gradient is None and other is None) or torch.equal(gradient, other)
    assert set(found[0][2].figures) == {"z"}
    kinds = {name.partition("/")[0] for name in found[1][2].figures}
    assert kinds == {
        "z", "mix_diagonal", "mix_column_error", "mix_post", "gain_forward", "gain_backward", "router_logit",
        "router_z", "clamp",
    }  # fmt: skip


def test_record_of_a_fresh_model_shows_what_its_initial_weights_mean() -> None:
    model, rows = model_and_rows()
    weights = losses.LossWeights(0.3, 1e-2, 1.0, 62, 60, 1.0, 1.0, watch=True)
    parts = [losses.compute(model, rows, weights, dense=False)[1] for _ in range(2)]
    figures = monitors.merged(parts)
    head, health = monitors.head_record(figures), monitors.health_record(figures)
    assert head["z"] == pytest.approx(math.log(48), abs=0.02) and head["z_max"] >= head["z"]
    sublayers = [f"{m}.{s}" for m in ("layers.0", "layers.1", "mtp.0") for s in ("attn", "ffn")]
    assert sorted(health["mix_diagonal"]) == sorted(sublayers)
    assert all(0.93 < value < 0.97 for value in health["mix_diagonal"].values())
    assert 0.99 < health["gain_forward"] < 1.001 and 0.99 < health["gain_backward"] < 1.01
    assert set(health["router_logit"]) == {"layers.0.ffn", "layers.1.ffn", "mtp.0.ffn"}
    assert health["clamp_rate"] == 0
    assert monitors.health_record({"z": (1.0, 1.0, 1.0)}) == {}


def test_norms_by_family_account_for_every_parameter() -> None:
    cfg = ModelConfig.preset("minke").replace(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), vocab_size=64)
    model = Transformer(cfg, seed=0)
    found = monitors.norms_by_family(((n, p.detach()) for n, p in model.named_parameters()), Mesh.alone())
    assert set(found) == set(monitors.FAMILIES) - {"engram", "other"}
    total = math.sqrt(sum(p.detach().square().sum().item() for p in model.parameters()))
    assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(total, rel=1e-4)
    assert found["embedding"] == pytest.approx(model.embed.weight.norm().item(), rel=1e-5)


def test_logged_steps_carry_the_heavy_figures_and_others_only_the_free_ones(tmp_path: Path) -> None:
    tiny_run(tmp_path, "run.log_every=4", "loss.z=1e-3")
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in steps] == [4, 8]
    for record in steps:
        assert record["muon_update_rms"] == pytest.approx(0.18, rel=0.1)  # less where a matrix lacks full rank
        assert record["grad_norm"] == pytest.approx(
            math.sqrt(sum(n**2 for n in record["grad_norms"].values())), rel=1e-4
        )
        assert 0.9 < record["health"]["gain_forward"] < 1.01
        assert record["z_max"] >= record["z"] > 0
        assert record["weight_norms"].keys() == record["grad_norms"].keys()


def test_the_update_that_muon_reports_is_the_one_it_made() -> None:
    draw = torch.Generator().manual_seed(0)
    parameters = {f"layers.{i}.w": torch.nn.Parameter(torch.randn(6 + 2 * i, 8, generator=draw)) for i in range(2)}
    muon = Muon([Assigned(name, p, Role("muon", (p.shape[0],))) for name, p in parameters.items()], weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=draw)
    assert muon.step(0.0) == (0.0, 0.0)  # not measured
    total, count = muon.step(0.5, measure=True)
    moved = [((p.detach() - before[name]) / 0.5).square().sum() for name, p in parameters.items()]
    assert count == 6 * 8 + 8 * 8 and total == pytest.approx(float(torch.stack(moved).sum()), rel=1e-4)
    assert math.sqrt(total / count) == pytest.approx(0.18, rel=0.02)
