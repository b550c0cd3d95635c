"""Facts about the network that parity alone does not show: gradient routes, hyper-connections at identity, rounding,
refusals of bad input."""

from typing import Any

import pytest
import torch
from small_models import build, config, some_tokens

from rorqual.errors import CacheError, RequestError
from rorqual.model import Trace, Transformer
from rorqual.ops import hyper_connections
from rorqual.ops.rounding import round_index_fp4, round_kv_fp8


def trained_by(model: Transformer, loss: torch.Tensor) -> set[str]:
    """Names of the parameters that get a gradient other than zero."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}


@pytest.mark.parametrize("dense", [False, True])
def test_only_its_own_loss_trains_the_indexer(dense: bool) -> None:
    model = build(config(num_hidden_layers=2, compress_ratios=[4, 4], num_hash_layers=0, index_topk=3))
    tokens = some_tokens(model, 60)[None]
    trace = Trace(index_loss=True, dense=dense)
    logits = model(tokens, trace=trace)
    assert len(trace.index_losses) == 2
    by_language = trained_by(model, logits.square().mean())
    assert by_language and not any(".indexer." in name for name in by_language)
    trace = Trace(index_loss=True, dense=dense)
    model(tokens, trace=trace)
    by_index = trained_by(model, torch.stack(trace.index_losses).sum())
    assert by_index and all(".indexer." in name for name in by_index)


def test_the_full_loss_reaches_every_parameter() -> None:
    model = build(
        config(num_hidden_layers=4, compress_ratios=[0, 4, 8, 4, 0], num_nextn_predict_layers=1, index_topk=3)
    )
    tokens = some_tokens(model, 64)[None]
    trace = Trace(index_loss=True, router=True)
    streams = model.forward_streams(tokens, trace=trace)
    drafts = model.mtp_streams(streams, tokens.roll(-1, 1), trace=trace)
    loss = (
        model.logits(model.final_hidden(streams)).square().mean()
        + model.logits(model.mtp_hidden(drafts)).square().mean()
    )
    balance = [r.balance_loss for r in trace.routers if r.balance_loss is not None]
    found = trained_by(model, loss + sum(trace.index_losses) + 1e-2 * torch.stack(balance).sum())
    assert {n for n, _ in model.named_parameters()} == found


def test_index_loss_is_zero_where_scores_already_match() -> None:
    """One visible entry leaves nothing to learn; more than one does."""
    model = build(config(num_hidden_layers=1, compress_ratios=[4], num_hash_layers=0))
    for count, is_zero in ((7, True), (30, False)):
        trace = Trace(index_loss=True)
        model(some_tokens(model, count)[None], trace=trace)
        assert (abs(trace.index_losses[0].item()) < 1e-6) == is_zero


def test_hyper_connections_at_identity_are_a_residual_network() -> None:
    """Identity mixing, input and output on stream 0 only: X' = X + y on that stream, exactly."""
    streams, y = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 8)
    post = torch.zeros(2, 3, 4)
    post[..., 0] = 1.0
    comb = torch.eye(4).expand(2, 3, 4, 4).contiguous()
    out = hyper_connections.hc_post(streams, y, post, comb)
    want = streams.clone()
    want[:, :, 0] += y
    assert torch.equal(out, want)


def test_comb_is_applied_transposed() -> None:
    comb = torch.zeros(1, 4, 4)
    comb[0, 1, 2] = 1.0  # stream 1 goes into stream 2
    streams = torch.arange(4.0).view(1, 4, 1)
    for run in hyper_connections.registry.implementations("hc_post").values():
        out = run(streams, torch.zeros(1, 1), torch.zeros(1, 4), comb)
        assert out.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


def test_v4_rounding_changes_values_and_passes_gradients() -> None:
    cfg = config(num_hidden_layers=2, compress_ratios=[4, 8], index_topk=3)
    plain = build(cfg)
    rounded = Transformer(cfg.replace(activation_rounding="v4"))
    rounded.load_state_dict(plain.state_dict())
    tokens = some_tokens(plain, 40)[None]
    gap = (plain(tokens) - rounded(tokens)).abs().max()
    assert 1e-5 < float(gap) < 2.0
    trace = Trace(index_loss=True)
    loss = rounded(tokens, trace=trace).square().mean() + sum(trace.index_losses)
    found = trained_by(rounded, loss)
    assert {n for n, p in rounded.named_parameters() if not n.startswith("mtp.")} == found


def test_rounding_of_cache_vectors() -> None:
    kv = torch.tensor([0.30078125, -0.25976562, 1.0, 0.8984375] + [0.1] * 60 + [0.123456789] * 8)
    out = round_kv_fp8(kv, 64)
    assert out[:4].tolist() == [0.3125, -0.25, 1.0, 0.875]
    assert torch.equal(out[64:], kv[64:])  # rope channels stay
    x = torch.tensor([5.0, -0.25, 0.26, 4.9, 0.2] + [0.0] * 27)
    assert round_index_fp4(x)[:5].tolist() == [4.0, -0.0, 0.5, 4.0, 0.0]


@pytest.mark.parametrize("rounding", ["none", "v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_equals_one_pass_in_every_precision(dtype: torch.dtype, rounding: str) -> None:
    """bf16 takes the reference path throughout; the state must still carry everything."""
    model = build(config(num_hidden_layers=3, compress_ratios=[0, 4, 8], index_topk=64, activation_rounding=rounding))
    model = model.to(dtype)
    tokens = some_tokens(model, 30)[None]
    with torch.no_grad():
        want = model(tokens)
        state = model.new_state()
        got = torch.cat([model(part, state=state) for part in tokens.split([11, 1, 1, 7, 10], dim=1)], 1)
    tolerance = 1e-4 if dtype == torch.float32 and rounding == "none" else 0.15
    assert float((got - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, "shape \\(3,\\)"),
        (torch.zeros(1, 3), {}, "dtype torch.float32"),
        (torch.full((1, 3), 10_000), {}, "vocabulary has"),
        (torch.full((1, 3), -1), {}, "between -1 and -1"),
        (torch.zeros(1, 3, dtype=torch.int64), {"lengths": [4]}, "lengths is \\[4\\]"),
        (torch.zeros(1, 3, dtype=torch.int64), {"lengths": [1, 2]}, "One|one length per row"),
        (torch.zeros(1, 3, dtype=torch.int64), {"segment_ids": torch.zeros(1, 2)}, "segment_ids has shape"),
    ],
)
def test_bad_calls_are_refused(tokens: torch.Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        build(config(num_hidden_layers=1, compress_ratios=[0]))(tokens, **options)


def test_a_state_of_another_shape_or_model_is_refused() -> None:
    model, other = (
        build(config(num_hidden_layers=1, compress_ratios=[0])),
        build(config(num_hidden_layers=1, compress_ratios=[4])),
    )
    row = some_tokens(model, 5)[None]
    with pytest.raises(CacheError, match="2 rows.*new_state\\(batch_size=1\\)"):
        model(row, state=model.new_state(2))
    with pytest.raises(CacheError, match="belongs to another model"):
        model(row, state=other.new_state(1))
    with pytest.raises(CacheError, match="another configuration"):
        model.restore(other.new_state().snapshot())
    with pytest.raises(CacheError, match="at least one row"):
        model.new_state(0)
    state = model.new_state()
    model(row, state=state)
    with pytest.raises(RequestError, match="packed documents start at position 0"):
        model(row, state=state, segment_ids=torch.zeros(1, 5))


def test_initial_loss_is_that_of_guessing() -> None:
    model = build(config(num_hidden_layers=4, compress_ratios=[0, 4, 8, 4]))
    fresh = Transformer(model.cfg, seed=5)
    tokens = some_tokens(model, 200)
    loss = torch.nn.functional.cross_entropy(fresh(tokens[None])[0], tokens.roll(-1))
    assert float(loss) == pytest.approx(torch.tensor(float(model.cfg.vocab_size)).log().item(), rel=0.01)


def test_seeds_decide_the_weights() -> None:
    cfg = config(num_hidden_layers=1, compress_ratios=[4])
    a, b, c = (Transformer(cfg, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
