"""The residual path: mHC, unconstrained hyper-connections and a plain sum, from coefficients to checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, config, full, gap, some_tokens
from torch import Tensor

from rorqual.checkpoint import load_official, save_official, save_transformers
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Trace, Transformer
from rorqual.ops import hyper_connections as ops
from rorqual.ops import registry
from rorqual.ops.rope import rope_table
from rorqual.planner import count_parameters
from rorqual.train.groups import Role, assign, blocks

PLAIN = {"residual": "plain", "hc_mult": 1}
FREE = {"residual": "hc"}
KINDS = [pytest.param(PLAIN, id="plain"), pytest.param(FREE, id="hc"), pytest.param({"residual": "mhc"}, id="mhc")]
WITH_MTP: dict[str, Any] = {"compress_ratios": [0, 4, 8, 4, 0], "num_nextn_predict_layers": 1}


def plain_streams(model: Transformer, tokens: Tensor) -> Tensor:
    """The trunk as one would write it for a single stream: x + attention(norm(x)), then x + experts(norm(x))."""
    layout = model._layout(tokens, None, None, None)
    x = model.embed.weight[tokens]
    for layer in model.layers:
        x = x + layer.attn(layer.attn_norm(x), layout, rope_table(layout.positions, layer.attn.frequencies))
        x = x + layer.ffn(layer.ffn_norm(x), tokens, layout)
    return x


def test_plain_is_a_residual_network() -> None:
    model = build(config(**PLAIN, **WITH_MTP))
    assert not any("hc_" in name for name, _ in model.named_parameters())
    tokens = some_tokens(model, 2, 30)
    with torch.no_grad():
        x = plain_streams(model, tokens)
        assert torch.equal(model.logits(model.norm(x)), model(tokens))
        mtp, following = model.mtp[0], tokens.roll(-1, 1)
        layout = model._layout(tokens, None, None, None)
        z = mtp.e_proj(mtp.enorm(model.embed.weight[following])) + mtp.h_proj(mtp.hnorm(x))
        z = z + mtp.attn(mtp.attn_norm(z), layout, rope_table(layout.positions, mtp.attn.frequencies))
        z = z + mtp.ffn(mtp.ffn_norm(z), following, layout)
        streams = model.forward_streams(tokens)
        assert streams.shape == (2, 30, 1, 32)
        assert torch.equal(mtp.norm(z), model.mtp_hidden(model.mtp_streams(streams, following)))


@pytest.mark.parametrize("only", ["", "reference"])
def test_mhc_at_identity_is_the_plain_network_bit_for_bit(only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_only", only)
    n = 4
    mhc = build(config(hc_eps=1e-30, **WITH_MTP))
    state = mhc.state_dict()
    for name, tensor in state.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("hc_"):
            tensor.zero_()
        if leaf.endswith("_base"):  # read stream 0, write stream 0, leave every stream in place
            tensor[:n] = -200.0
            tensor[0] = 200.0
        if leaf in ("hc_attn_base", "hc_ffn_base"):
            tensor[n] = 0.0  # 2 sigmoid(0) = 1
            tensor[n + 1 : 2 * n] = -200.0
            tensor[2 * n :].view(n, n).fill_diagonal_(200.0)
    plain = Transformer(config(**PLAIN, **WITH_MTP), seed=None).eval()
    plain.load_state_dict({k: v for k, v in state.items() if "hc_" not in k})
    tokens = some_tokens(mhc, 2, 30)
    for draft in (False, True):
        results = []
        for model in (mhc, plain):
            model.zero_grad(set_to_none=True)
            streams = model.forward_streams(tokens)
            hidden = model.mtp_hidden(model.mtp_streams(streams, tokens)) if draft else model.final_hidden(streams)
            logits = model.logits(hidden)
            logits.square().mean().backward()
            results.append((logits.detach(), model.embed.weight.grad.clone()))
        (a, a_grad), (b, b_grad) = results
        assert torch.equal(a, b)
        torch.testing.assert_close(a_grad, b_grad)


def free_by_hand(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, y_of: Any) -> Tensor:
    """One sublayer of the hyper-connections paper for one token [N, D], entry by entry, in the inputs' precision."""
    n, d = streams.shape
    norm = [row / (row.square().sum() / d + 1e-6).sqrt() for row in streams]
    pre = [base[j] + scale[0] * torch.tanh(norm[j] @ fn[0]) for j in range(n)]
    post = [base[n + j] + scale[1] * torch.tanh(norm[j] @ fn[1]) for j in range(n)]
    y = y_of(sum(pre[j] * streams[j] for j in range(n)))
    out = []
    for k in range(n):
        mixed = sum(
            (base[2 * n + j * n + k] + scale[2] * torch.tanh(norm[j] @ fn[2 + k])) * streams[j] for j in range(n)
        )
        out.append(mixed + post[k] * y)
    return torch.stack(out)


@pytest.mark.parametrize("n", [1, 3])
def test_free_hyper_connections_and_their_gradients_follow_the_paper(n: int) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = [(2, 5, n, 8), (n + 2, 8), (2 * n + n * n,), (3,)]
    ours = [torch.randn(s, generator=draw).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in ours]
    weights = torch.randn(2, 5, n, 8, generator=draw)
    x, post, comb = ops.free_pre(*ours, norm_eps=1e-6)
    out = ops.hc_post(ours[0], torch.sin(x), post, comb)
    rows = [free_by_hand(s, *exact[1:], torch.sin) for s in exact[0].flatten(0, 1)]
    expected = torch.stack(rows).view_as(exact[0])
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-4)


def test_unconstrained_at_its_start_is_the_plain_network() -> None:
    free, plain = Transformer(config(**FREE, **WITH_MTP)), Transformer(config(**PLAIN, **WITH_MTP))
    tokens = some_tokens(free, 2, 30)
    with torch.no_grad():
        assert gap(free(tokens), plain(tokens)) < 1e-5  # same seed: shared parameters are drawn alike
        drafts = [m.mtp_hidden(m.mtp_streams(m.forward_streams(tokens), tokens)) for m in (free, plain)]
    assert gap(*drafts) < 1e-4
    base = free.state_dict()["layers.1.hc_ffn_base"]
    assert base[:4].tolist() == [0, 0, 0, 1] and base[4:8].tolist() == [1] * 4  # the fourth sublayer reads stream 3
    assert torch.equal(base[8:].view(4, 4), torch.eye(4))
    assert not free.state_dict()["layers.1.hc_ffn_fn"].any()


@pytest.mark.parametrize("changes", KINDS)
def test_every_parameter_learns_and_chunks_agree(changes: dict[str, Any]) -> None:
    model = build(config(**changes, **WITH_MTP))
    tokens = some_tokens(model, 40)
    trace = Trace(index_loss=True, router=True)
    streams = model.forward_streams(tokens[None], trace=trace)
    drafts = model.mtp_streams(streams, tokens[None].roll(-1, 1))
    loss = model.logits(model.final_hidden(streams)).square().mean() + model.mtp_hidden(drafts).square().mean()
    (loss + sum(trace.index_losses)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
    state = model.new_state()
    with torch.no_grad():
        parts = [model(tokens[None, a:b], state=state)[0] for a, b in ((0, 7), (7, 8), (8, 25), (25, 40))]
    tolerance = 1e-3 if changes["residual"] == "hc" else 1e-4  # nothing bounds how far hc carries rounding
    assert gap(torch.cat(parts), full(model, tokens)) < tolerance


@pytest.mark.parametrize("changes", [PLAIN, FREE], ids=["plain", "hc"])
def test_a_checkpoint_comes_back_and_is_not_taken_for_v4(changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(config(**changes, **WITH_MTP))
    save_official(model, tmp_path / "own", dtype=torch.float32)
    described = json.loads((tmp_path / "own" / "config.json").read_text())
    assert described["model_type"] == "rorqual" and "Deepseek" not in described["architectures"][0]
    again = load_official(tmp_path / "own")
    assert again.cfg.residual == changes["residual"]
    tokens = some_tokens(model, 2, 20)
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
    with pytest.raises(ConfigError, match="mhc kind only.*save_official"):
        save_transformers(model, tmp_path / "theirs")
    described["residual"], described["hc_mult"] = "mhc", 4
    (tmp_path / "own" / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError):
        load_official(tmp_path / "own")


def test_config() -> None:
    for changes in (PLAIN, FREE, {}):
        cfg = config(**changes)
        assert ModelConfig.from_dict(cfg.to_dict()) == cfg
    assert "residual" not in config().to_dict() and config().to_dict()["model_type"] == "deepseek_v4"
    with pytest.raises(ConfigError, match="residual is 'sum'; use 'mhc'"):
        config(residual="sum")
    with pytest.raises(ConfigError, match="one stream, but hc_mult is 4; set hc_mult to 1"):
        config(residual="plain")


def test_roles_and_counts() -> None:
    free = Transformer(config(**FREE))
    roles = {a.name: a.role for a in assign(free, free.cfg)}
    assert roles["layers.0.hc_attn_fn"] == Role("muon", (1, 1, 4)) and roles["layers.0.hc_ffn_base"] == Role("bias")
    fn = free.state_dict()["layers.0.hc_attn_fn"]
    assert [tuple(b.shape) for b in blocks(fn, roles["layers.0.hc_attn_fn"])] == [(1, 1, 32), (1, 1, 32), (1, 4, 32)]
    counts = {kind: count_parameters(config(**changes)) for kind, changes in (("p", PLAIN), ("f", FREE), ("m", {}))}
    assert counts["f"].total - counts["p"].total == 8 * (6 * 32 + 24 + 3)
    assert counts["m"].total - counts["p"].total == 8 * (24 * 4 * 32 + 24 + 3) + 4 * 4 * 32 + 4 + 1
    assert "hyper_connections" not in counts["p"].by_component


def test_adamw_can_take_the_matrices() -> None:
    model = Transformer(config())
    muon, adamw = assign(model, model.cfg), assign(model, model.cfg, matrix_optimizer="adamw")
    assert [a.name for a in muon] == [a.name for a in adamw]
    for before, after in zip(muon, adamw, strict=True):
        assert after.role == (Role("decayed") if before.role.kind == "muon" else before.role)
    assert sum(a.role.kind == "muon" for a in muon) > 40
