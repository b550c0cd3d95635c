"""Facts about the network that parity alone does not show: gradient routes, hyper-connections at identity, rounding,
refusals of bad input."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import TOLERANCE, build, config, some_tokens

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


@pytest.mark.parametrize("dense", [False, True])
def test_padding_teaches_nothing(dense: bool) -> None:
    """Router counts, balance and index losses of padded rows are those of the rows without their padding."""
    model = build(config(index_topk=3))
    rows = torch.stack([some_tokens(model, 50), some_tokens(model, 50).flip(0)])
    padded = torch.cat([rows, rows[:, :30]], 1)
    found = []
    for tokens, lengths in ((rows, None), (padded, [50, 50])):
        trace = Trace(index_loss=True, router=True, dense=dense)
        model(tokens, lengths=lengths, trace=trace)
        balance = [r.balance_loss for r in trace.routers if r.balance_loss is not None]
        found.append([*trace.index_losses, *trace.index_recall, *balance, *(r.counts for r in trace.routers)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("run", [hyper_connections.hc_post, hyper_connections.hc_post_reference])
def test_comb_is_applied_transposed(run: Callable[..., torch.Tensor]) -> None:
    comb = torch.zeros(1, 4, 4)
    comb[0, 1, 2] = 1.0  # stream 1 goes into stream 2
    streams = torch.arange(4.0).view(1, 4, 1)
    out = run(streams, torch.zeros(1, 1), torch.zeros(1, 4), comb)
    assert out.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


def test_v4_rounding_changes_values_and_passes_gradients() -> None:
    cfg = config(num_hidden_layers=2, compress_ratios=[4, 8], index_topk=3)
    plain = build(cfg)
    rounded = Transformer(cfg.replace(activation_rounding="v4"))
    rounded.load_state_dict(plain.state_dict())
    tokens = some_tokens(plain, 40)[None]
    gap = (plain(tokens) - rounded(tokens)).abs().max().item()
    assert 1e-5 < gap < 2.0
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
    """Whatever path a precision takes, the state must carry everything."""
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


def test_packed_documents_through_a_state() -> None:
    """Documents packed in rows, cut into calls anywhere: each gives the logits it has alone."""
    model = build(config())
    rows = torch.stack([some_tokens(model, 60), some_tokens(model, 60).flip(0)])
    ids = torch.zeros(2, 60, dtype=torch.int64)
    ids[0, 13:] = 1
    ids[0, 40:] = 0
    ids[1, 29:] = 5
    with torch.no_grad():
        want = model(rows, segment_ids=ids)
        state = model.new_state(2)
        cuts = [7, 6, 20, 1, 1, 25]
        got = torch.cat(
            [
                model(t, segment_ids=i, state=state)
                for t, i in zip(rows.split(cuts, 1), ids.split(cuts, 1), strict=True)
            ],
            1,
        )
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
        assert state.lengths == [20, 31]
        more = some_tokens(model, 9)[None].expand(2, -1)
        after = model(more, state=state)  # goes on with each row's last document
        for row, begin in ((0, 40), (1, 29)):
            alone = model(torch.cat([rows[row, begin:], more[row]])[None])[0, -9:]
            torch.testing.assert_close(after[row], alone, rtol=0, atol=TOLERANCE)


def test_an_empty_call_changes_nothing() -> None:
    model = build(config())
    tokens = some_tokens(model, 9)[None]
    with torch.no_grad():
        state = model.new_state()
        first = model(tokens[:, :4], state=state)
        assert model(tokens[:, :0], state=state).shape == (1, 0, model.cfg.vocab_size)
        rest = model(tokens[:, 4:], state=state)
        torch.testing.assert_close(torch.cat([first, rest], 1), model(tokens), rtol=0, atol=TOLERANCE)
    assert model(tokens[:, :0]).shape == (1, 0, model.cfg.vocab_size)


def test_a_state_crosses_inference_mode_and_gradients() -> None:
    """Filled in inference mode, used outside; gradients end at the border of a call and nothing is kept alive."""
    model = build(config())
    tokens = some_tokens(model, 40)[None]
    with torch.inference_mode():
        state = model.new_state()
        model(tokens[:, :20], state=state)
        copy = state.fork()
    out = model(tokens[:, 20:30], state=state)
    out.square().mean().backward()
    again = model(tokens[:, 30:], state=state)
    again.square().mean().backward()
    assert not any(t.requires_grad for layer in state.layers for t in layer.tensors().values())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, 20:], state=copy)[:, 10:], again, rtol=0, atol=TOLERANCE)


def test_an_interrupted_call_leaves_a_state_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(config())
    tokens = some_tokens(model, 20)[None]
    state = model.new_state()
    model(tokens[:, :5], state=state)
    saved = state.snapshot()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.layers[2].ffn, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        model(tokens[:, 5:], state=state)
    with pytest.raises(CacheError, match="stopped half-way.*Restore a snapshot"):
        model(tokens[:, 5:], state=state)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens[:, 5:], state=model.restore(saved)), model(tokens)[:, 5:], rtol=0, atol=TOLERANCE
        )


def test_casting_keeps_exact_tensors_and_refuses_old_states() -> None:
    model = build(config(num_nextn_predict_layers=1, compress_ratios=[0, 4, 8, 4, 0]))
    state, saved = model.new_state(), model.new_state().snapshot()
    frequencies = model.layers[1].attn.frequencies.clone()
    model.bfloat16()
    kinds = {n: t.dtype for n, t in model.state_dict().items()}
    exact = ("_fn", "_base", "_scale", "attn_sink", "ape", "gate.bias")
    assert {t for n, t in kinds.items() if n.endswith(exact)} == {torch.float32}
    assert {t for n, t in kinds.items() if n.endswith(".weight")} == {torch.bfloat16}
    assert torch.equal(model.layers[1].attn.frequencies, frequencies)
    with pytest.raises(CacheError, match="holds torch.float32.*the model is torch.bfloat16"):
        model(some_tokens(model, 3)[None], state=state)
    with pytest.raises(CacheError, match="taken in torch.float32"):
        model.restore(saved)


def test_autocast_takes_the_reference_path() -> None:
    model = build(config())
    tokens = some_tokens(model, 30)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens)
    out.float().square().mean().backward()
    want = model(tokens).detach()
    assert float((out.detach() - want).norm() / want.norm()) < 0.2


def test_rows_and_snapshots_are_kept_apart() -> None:
    model = build(config())
    rows = torch.stack([some_tokens(model, 40), some_tokens(model, 40).flip(0)])
    with torch.no_grad():
        state = model.new_state(2, rewind=4)
        model(rows[:, :10], state=state)
        state.snapshot()
        model(rows[:, 10:], state=state)
        state.truncate([0, 40])  # the snapshot still holds for row 1
        state.truncate([0, 12])
        assert state.lengths == [0, 12]
        other = model.new_state(1, rewind=4)
        model(rows[:1, :40], state=other)
        state.put_row(0, other)
        got = model(rows[:, 12:14], state=state, lengths=[0, 2])[1]
        torch.testing.assert_close(got, model(rows[1:])[0, 12:14], rtol=0, atol=TOLERANCE)
        with pytest.raises(CacheError, match="no snapshot"):
            state.truncate([12, 14])
        with pytest.raises(CacheError, match="rewind=4.*rewind=128"):
            state.put_row(0, model.new_state(1))
    for wrong in (3.0, [1, 2, 3], "1"):
        with pytest.raises(CacheError, match="whole number"):
            state.truncate(wrong)  # type: ignore[arg-type]


def test_few_snapshots_are_remembered_and_counted() -> None:
    model = build(config())
    state = model.new_state()
    for token in some_tokens(model, 30).split(1):
        with torch.no_grad():
            model(token[None], state=state)
        state.snapshot()
        state.snapshot()
    assert len(state.snapshots) == 16
    assert state.nbytes()["snapshots"] == sum(len(s.data) for s in state.snapshots) > 0
    assert state.snapshot(remember=False) and len(state.snapshots) == 16


def test_initial_loss_is_that_of_guessing() -> None:
    model = build(config(num_hidden_layers=4, compress_ratios=[0, 4, 8, 4]))
    fresh = Transformer(model.cfg, seed=5)
    tokens = some_tokens(model, 200)
    loss = torch.nn.functional.cross_entropy(fresh(tokens[None])[0], tokens.roll(-1))
    assert loss.item() == pytest.approx(math.log(model.cfg.vocab_size), rel=0.01)


def test_seeds_decide_the_weights() -> None:
    cfg = config(num_hidden_layers=1, compress_ratios=[4])
    a, b, c = (Transformer(cfg, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
