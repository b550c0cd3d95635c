"""Engram in the network: the gate, the convolution, rows from elsewhere, who trains what, and files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, config, some_tokens
from torch import Tensor

from rorqual.checkpoint import load_official, save_official, save_transformers, summarise
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Trace, Transformer
from rorqual.model.engram import Engram, install_compression, memories
from rorqual.model.layout import Layout
from rorqual.ops.engram_gate import FLOOR, engram_gate, engram_gate_reference, signed_sqrt
from rorqual.planner import count_parameters
from rorqual.train.groups import assign
from rorqual.train.table_adam import TableAdam, gradient_values

MEMORY = {"layers": [1, 2], "rows": 53, "orders": [2, 3], "heads": 2, "head_dim": 4}


def settings(**changes: Any) -> ModelConfig:
    return config(engram={**MEMORY, **changes})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the gate


def test_gate_and_its_derivatives_equal_autograd() -> None:
    h, k, weight = random(3, 5, 4, 16), random(3, 5, 4, 16, seed=1), 1 + 0.3 * random(4, 16, seed=2)
    k[0, 0] = 0.0  # z is exactly zero
    for place, small in ((1, 3e-7), (2, 1e-3)):  # and almost zero, below the floor and above it
        x = (h * weight)[0, place, 0]
        k[0, place, 0] = 0.0
        k[0, place, 0, :3] = torch.stack([x[1], -x[0], small * x[2].sign()])
    found, grads = [], []
    for function in (engram_gate, engram_gate_reference):
        inputs = [t.clone().requires_grad_() for t in (h, k, weight)]
        gate = function(inputs[0], inputs[1], inputs[2], 1e-6)
        gate.backward(random(3, 5, 4, seed=3))
        found.append(gate.detach())
        grads.append([t.grad for t in inputs])
    assert (found[0] - found[1]).abs().max() <= 1e-5 and (found[0][0, 0] == 0.5).all()
    below, above = torch.logit(found[0][0, 1:3, 0]).square().tolist()
    assert below == pytest.approx(FLOOR, rel=0.01) and 2 * FLOOR < above < 1e-3
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None and theirs is not None and torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1)


def test_gate_against_differences_in_double_steps() -> None:
    """The written derivative is that of the function itself, also for small z."""
    h, k, weight = random(2, 3, 8).double(), random(2, 3, 8, seed=1).double(), torch.ones(3, 8)
    k[1] *= 1e-3
    inputs = h.float().requires_grad_()
    engram_gate(inputs, k.float(), weight, 1e-6).sum().backward()

    def exact(x: Tensor) -> Tensor:
        hn, kn = (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) for t in (x, k))
        return torch.sigmoid(signed_sqrt((hn * kn).sum(-1) / 8**0.5)).sum()

    step, numeric = 1e-6, torch.zeros_like(h)
    for index in range(h.numel()):
        change = torch.zeros_like(h).view(-1)
        change[index] = step
        change = change.view_as(h)
        numeric.view(-1)[index] = (exact(h + change) - exact(h - change)) / (2 * step)
    assert inputs.grad is not None and (inputs.grad - numeric).abs().max() < 1e-5


def test_signed_sqrt_has_a_floor() -> None:
    z = torch.tensor([-4.0, -1e-9, 0.0, 1e-9, 0.25])
    assert torch.allclose(signed_sqrt(z), torch.tensor([-2.0, -(FLOOR**0.5), 0.0, FLOOR**0.5, 0.5]))


# ------------------------------------------------------------------ the module


def memory_of(cfg: ModelConfig, block: int = 1) -> Engram:
    module = build(cfg).layers[block].engram
    assert isinstance(module, Engram)
    return module


def layout_of(tokens: Tensor) -> Layout:
    return Layout(tokens.shape[0], tokens.shape[1], tokens.device)


def by_hand(memory: Engram, streams: Tensor, tokens: Tensor) -> Tensor:
    """Gated value of one document, in single steps."""
    layout = layout_of(tokens)
    ids = memory.hash.compress(tokens)
    rows = memory.hash(ids, layout.halo(ids, 2), layout)
    e = memory.table[rows].flatten(-2)
    n, d = memory.streams, memory.hidden
    w_k, w_v = memory.proj.weight[: n * d].view(n, d, -1), memory.proj.weight[n * d :]
    value = e @ w_v.T
    out = []
    for s in range(n):
        h = torch.nn.functional.rms_norm(streams[..., s, :], (d,), memory.h_norm.view(n, d)[s], memory.eps)
        k = torch.nn.functional.rms_norm(e @ w_k[s].T, (d,), memory.k_norm.view(n, d)[s], memory.eps)
        gate = torch.sigmoid(signed_sqrt((h * k).sum(-1) / d**0.5))
        out.append(gate.unsqueeze(-1) * value)
    return torch.stack(out, -2)


def test_a_new_module_is_the_gated_value() -> None:
    """The convolution starts at zero: SiLU(0) + u = u, exactly."""
    cfg = settings()
    tokens, streams = some_tokens(build(cfg), 2, 20), random(2, 20, 4, 32)
    models = Transformer(cfg, seed=3), Transformer(settings(flavour="v41"), seed=3)
    paper, v41 = (model.layers[1].engram for model in models)
    assert isinstance(paper, Engram) and isinstance(v41, Engram) and not paper.conv.any()
    v41.eps = paper.eps
    with torch.no_grad():
        out = paper(streams, tokens, layout_of(tokens))
        assert torch.equal(out, v41(streams, tokens, layout_of(tokens)))
        expected = by_hand(paper, streams, tokens)
        assert (out - streams - expected).abs().max() < 1e-6 and expected.abs().max() > 1e-3
        trace = Trace(capture=["layers.1.engram.gate"])
        models[0](tokens, trace=trace)
        gate = trace.captured["layers.1.engram.gate"]
        assert gate.shape == (2, 20, 4) and 0.3 < float(gate.mean()) < 0.7, "gates start around one half"


def test_the_convolution_is_causal_dilated_and_stays_in_the_document() -> None:
    memory = memory_of(settings())
    gated = random(1, 30, 4, 32)
    segments = torch.tensor([[0] * 14 + [1] * 16])
    taps = memory.conv.view(4, 32, 4)
    normed = memory._normed(gated)
    with torch.no_grad():
        out = memory._convolve(gated, Layout(1, 30, gated.device, segment_ids=segments), None)
        for t in range(30):
            start = 0 if t < 14 else 14
            total = sum(normed[0, t - 3 * j] * taps[..., 3 - j] for j in range(4) if t - 3 * j >= start)
            assert (out[0, t] - torch.nn.functional.silu(total)).abs().max() < 1e-5, t


def test_equal_streams_and_keys_are_one_stream() -> None:
    four, one = memory_of(settings()), memory_of(config(engram=MEMORY, hc_mult=1))
    n, d = 4, 32
    with torch.no_grad():
        one.table.copy_(four.table)
        four.proj.weight[: n * d] = four.proj.weight[:d].repeat(n, 1)
        one.proj.weight.copy_(torch.cat([four.proj.weight[:d], four.proj.weight[n * d :]]))
        for name in ("h_norm", "k_norm", "conv_norm", "conv"):
            theirs = getattr(four, name)
            theirs.copy_(theirs[:d].repeat(n, *[1] * (theirs.ndim - 1)))
            getattr(one, name).copy_(theirs[:d])
        tokens, streams = some_tokens(build(settings()), 1, 25), random(1, 25, 1, 32)
        alone = one(streams, tokens, layout_of(tokens))
        together = four(streams.expand(-1, -1, n, -1), tokens, layout_of(tokens))
    assert (together - alone).abs().max() <= 1e-6


def test_off_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    """Weights, outputs, config and files of a V4 model know nothing of it, and it shifts no other weight."""
    plain, with_memory = Transformer(config(), seed=5), Transformer(settings(), seed=5)
    assert not [name for name in plain.state_dict() if "engram" in name]
    theirs = with_memory.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in plain.state_dict().items())
    tokens = some_tokens(plain, 2, 40)
    with torch.no_grad():
        expected = plain(tokens)
        assert not torch.equal(with_memory(tokens), expected)
        for memory in memories(with_memory):
            memory.is_off = True
        assert torch.equal(with_memory(tokens), expected)
    save_official(plain, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "engram" not in written and written["model_type"] == "deepseek_v4"
    loaded = load_official(tmp_path)
    assert not loaded.load_report.missing and not loaded.load_report.unexpected
    assert set(plain.new_state().nbytes()) == {"window", "entries", "index_keys", "pending", "snapshots", "total"}


# ------------------------------------------------------------------ rows from elsewhere


def gradients(model: Transformer, tokens: Tensor, announced: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    halves = tokens.split(1)
    if announced:
        model.announce([(half, None, None) for half in halves])
    logits = [model(half) for half in halves]
    for one in logits:
        one.square().mean().backward()
    if announced:
        model.collect()
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grads[name] = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.clone()
    return torch.cat(logits).detach(), grads


@pytest.mark.parametrize(
    ("placement", "sparse", "announced"),
    [("device", True, False), ("device", True, True), ("host", False, False), ("host", True, True)],
)
def test_fetched_rows_equal_a_plain_table(placement: str, sparse: bool, announced: bool) -> None:
    """Same logits and gradients bit for bit, whether rows are read, fetched per call or for a whole step."""
    model = build(settings(placement=placement))
    for memory in memories(model):
        memory.is_sparse = sparse
    tokens = some_tokens(model, 2, 24)
    logits, grads = gradients(model, tokens, announced)
    expected, theirs = gradients(build(settings()), tokens)
    assert torch.equal(logits, expected) and set(grads) == set(theirs)
    for name in grads:
        assert torch.equal(grads[name], theirs[name]), name
    assert memories(model)[0].table.grad.is_sparse is sparse


def test_a_sparse_gradient_has_the_rows_that_were_read_and_no_others() -> None:
    model = build(settings(placement="host"))
    memory = memories(model)[0]
    memory.is_sparse = True
    tokens, segments = some_tokens(model, 1, 20), torch.tensor([[0] * 12 + [1] * 8])
    model.announce([(tokens, [15], segments)])
    model.forward_streams(tokens, lengths=[15], segment_ids=segments).square().sum().backward()
    model.collect()
    gradient = memory.table.grad
    assert gradient is not None and gradient.is_coalesced()
    layout = Layout(1, 20, tokens.device, segment_ids=segments)
    ids = memory.hash.compress(tokens)
    rows = memory.hash(ids, layout.halo(ids, 2), layout)[:, :15]
    assert gradient.indices()[0].tolist() == sorted(set(rows.flatten().tolist())), "padding reads nothing"


def test_a_row_that_was_not_announced_is_an_error() -> None:
    model = build(settings(placement="host"))
    tokens = some_tokens(model, 1, 20)
    model.announce([(tokens[:, :10], None, None)])
    model(tokens[:, :10])
    with pytest.raises(AssertionError, match="row was needed"):
        model(tokens)
    for memory in memories(model):
        memory.forget()
    model(tokens)


def test_a_host_table_is_cast_but_not_moved() -> None:
    model = build(settings(placement="host"))
    before = [name for name, _ in model.named_parameters()]
    model.to("meta")
    assert not memories(model)[0].table.is_meta and memories(model)[0].proj.weight.is_meta
    model = build(settings(placement="host")).to(torch.bfloat16)
    assert memories(model)[0].table.dtype == torch.bfloat16 and memories(model)[0].hash.sizes.dtype == torch.int64
    assert [name for name, _ in model.named_parameters()] == before
    logits = model(some_tokens(model, 1, 9))
    assert torch.isfinite(logits).all()
    with torch.device("meta"):
        empty = Transformer(settings(placement="host"))
    assert all(t.is_meta for t in empty.state_dict().values())
    assert memories(empty.to_empty(device="cpu"))[0].table.device.type == "cpu"


# ------------------------------------------------------------------ training


def test_who_trains_what() -> None:
    cfg = settings()
    roles = {a.name.removeprefix("layers.1.engram."): a.role for a in assign(Transformer(cfg), cfg)}
    assert roles["table"].kind == "table"
    assert roles["proj.weight"].kind == "muon" and roles["proj.weight"].row_splits == (32,) * 5
    assert [roles[name].kind for name in ("h_norm", "k_norm", "conv_norm", "conv")] == ["decayed"] * 3 + ["bias"]
    adamw = {a.name: a.role for a in assign(Transformer(cfg), cfg, matrix_optimizer="adamw")}
    assert adamw["layers.1.engram.table"].kind == "table"


def table_of(model: Transformer) -> list[Any]:
    return [a for a in assign(model, model.cfg) if a.role.kind == "table"]


def test_dense_updates_are_torch_adam_at_five_times_the_rate() -> None:
    model = build(settings())
    tables = table_of(model)
    theirs = [torch.nn.Parameter(a.parameter.detach().clone()) for a in tables]
    ours, reference = TableAdam(tables), torch.optim.Adam(theirs, lr=5e-3, betas=(0.9, 0.95), eps=1e-20)
    for step, scale in enumerate([1.0, 0.3, 0.1]):  # a schedule
        for a, b in zip(tables, theirs, strict=True):
            a.parameter.grad = random(*a.parameter.shape, seed=step)
            a.parameter.grad[:10] = 0.0
            b.grad = a.parameter.grad.clone()
        for group in reference.param_groups:
            group["lr"] = 5e-3 * scale
        ours.step(1e-3 * scale)
        reference.step()
        for a, b in zip(tables, theirs, strict=True):
            torch.testing.assert_close(a.parameter, b, rtol=1e-6, atol=1e-7)


def test_sparse_updates_touch_the_rows_in_the_gradient() -> None:
    model = build(settings())
    (assigned, _) = table_of(model)
    table, start = assigned.parameter, assigned.parameter.detach().clone()
    theirs = torch.nn.Parameter(start.clone())
    ours, reference = TableAdam([assigned]), torch.optim.SparseAdam([theirs], lr=5e-3, betas=(0.9, 0.95), eps=1e-20)
    touched: set[int] = set()
    for step, rows in enumerate([[1, 5, 9], [5, 9, 30], [2]]):
        touched |= set(rows)
        gradient = torch.sparse_coo_tensor([rows], random(len(rows), 4, seed=step), table.shape, check_invariants=True)
        table.grad, theirs.grad = gradient, gradient.clone()
        ours.step(1e-3)
        reference.step()
        torch.testing.assert_close(table, theirs, rtol=1e-5, atol=1e-6)
    still = [row for row in range(table.shape[0]) if row not in touched]
    assert torch.equal(table[still], start[still]) and not (table[sorted(touched)] == start[sorted(touched)]).any()


def test_state_by_name_continues_exactly() -> None:
    runs = []
    for split in (False, True):
        model = build(settings())
        tables = table_of(model)
        optimizer = TableAdam(tables)
        assert optimizer.state_dict() == {}
        for step in range(4):
            for a in tables:
                a.parameter.grad = random(*a.parameter.shape, seed=step)
            optimizer.step(1e-3)
            if split and step == 1:
                saved = {k: v.clone() for k, v in optimizer.state_dict().items()}
                optimizer = TableAdam(tables)
                optimizer.load_state_dict(saved)
        runs.append([a.parameter.detach().clone() for a in tables])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with pytest.raises(CheckpointError, match=r"nothing for layers.1.engram.table"):
        TableAdam(tables).load_state_dict({"#step": torch.ones(1)})


def test_norms_of_sparse_gradients_are_those_of_dense_ones() -> None:
    table = torch.nn.Parameter(random(50, 4))
    one = torch.sparse_coo_tensor([[3, 7]], random(2, 4, seed=1), (50, 4), check_invariants=True)
    table.grad = one + torch.sparse_coo_tensor([[7, 9]], random(2, 4, seed=2), (50, 4), check_invariants=True)
    dense = table.grad.to_dense()
    values = gradient_values(table)
    assert values is not None and torch.allclose(values.norm(), dense.norm())
    values.mul_(0.5)
    assert torch.allclose(table.grad.to_dense(), dense * 0.5)


# ------------------------------------------------------------------ files and figures


@pytest.mark.parametrize("flavour", ["paper", "v41"])
def test_checkpoints_keep_everything(flavour: str, tmp_path: Path) -> None:
    model = build(settings(flavour=flavour, seed=4))
    install_compression(model, torch.arange(64) // 2)
    save_official(model, tmp_path, dtype=torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["engram"]["flavour"] == flavour and written["model_type"] == "rorqual"
    summary = summarise(tmp_path)
    assert summary.fits and summary.layout == "official"
    loaded = load_official(tmp_path)
    assert loaded.cfg.engram == model.cfg.engram
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = some_tokens(model, 1, 30)
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))
    half = tmp_path / "bf16"
    save_official(model, half, dtype=torch.bfloat16)
    again = load_official(half).state_dict()
    assert all(torch.equal(again[n], v) for n, v in model.state_dict().items() if ".hash." in n)


def test_transformers_cannot_have_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Engram memories in blocks \[1, 2\].*save_official"):
        save_transformers(build(settings()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_hash_constants_are_refused(tmp_path: Path) -> None:
    model = build(settings())
    memories(model)[1].hash.multipliers[0] = 2
    save_official(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.2.engram.hash in .* unusable hash constants"):
        load_official(tmp_path)


def test_minke_engram_is_minke_s_size() -> None:
    minke, ours = ModelConfig.preset("minke"), ModelConfig.preset("minke-engram")
    plain, count = count_parameters(minke), count_parameters(ours)
    assert abs(count.total - plain.total) < 1e-3 * plain.total
    parts = count.by_component
    share = parts["engram_tables"] / (count.total - count.activated)
    assert 0.20 <= share <= 0.25, "of what is not active on every token, tables hold a fifth to a quarter"
    assert parts["engram_tables"] == 16 * sum(memories(Transformer(ours, None))[0].hash.sizes.tolist())
    assert parts["engram_fusion"] == 128 * (4 * 128 + 128) + 3 * 4 * 128 + 4 * 128 * 4
    assert (
        count.activated
        == count.total - parts["embedding"] - parts["engram_tables"] - parts["routed_experts"] * 10 // 12
    )
    assert ours.replace(engram=None, n_routed_experts=16) == minke
