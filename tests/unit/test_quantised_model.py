"""A model that computes with its stored weights: which ones, how often they are rounded, and that nothing gets past."""

import copy
import re

import pytest
import torch
from small_models import build, config, packable_config
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.model import Trace, Transformer, next_tokens, quantised
from rorqual.model.linear import Linear
from rorqual.ops import fake_quant, quant
from rorqual.train.config import QatSection
from rorqual.train.losses import IGNORE, cross_entropy_sum
from rorqual.train.qat import Qat

torch.set_num_threads(1)

CONFIG = packable_config()
TOKENS = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model() -> Transformer:
    return build(CONFIG)


def baked(model: Transformer, rounding: str) -> Transformer:
    """A plain model whose weights are the values that `model` computes with."""
    plain = Transformer(model.cfg.replace(activation_rounding=rounding), seed=None).eval()
    plain.load_state_dict({**model.state_dict(), **quantised.used_values(model)})
    return plain


def decoded(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of feeding one token at a time."""
    state = model.new_state(tokens.shape[0])
    with torch.no_grad():
        return torch.cat([model(tokens[:, i : i + 1], state=state) for i in range(tokens.shape[1])], 1)


# every tensor of a layer, in the format that the released checkpoints have it in
FORMATS = {
    "fp8": "attn.wq_a attn.wq_b attn.wkv attn.wo_a attn.wo_b attn.indexer.wq_b ffn.shared_experts.w1 "
    "ffn.shared_experts.w2 ffn.shared_experts.w3 e_proj h_proj",
    "bf16": "attn_norm ffn_norm enorm hnorm norm ffn.gate attn.q_norm attn.kv_norm attn.compressor.wkv "
    "attn.compressor.wgate attn.compressor.norm attn.indexer.weights_proj attn.indexer.compressor.wkv "
    "attn.indexer.compressor.wgate attn.indexer.compressor.norm",
}
FP32 = {
    "attn.attn_sink", "attn.compressor.ape", "attn.indexer.compressor.ape", "ffn.gate.bias", "ffn.gate.tid2eid",
    "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale",
    "hc_head_fn", "hc_head_base", "hc_head_scale",
}  # fmt: skip


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_formats_are_those_of_the_released_files(model: Transformer, experts):
    wanted = {f"{leaf}.weight": kind for kind, leaves in FORMATS.items() for leaf in leaves.split()}
    wanted |= dict.fromkeys(FP32, "fp32")
    wanted |= {f"ffn.experts.{part}": experts for part in ("w1", "w2", "w3")}
    seen = set()
    for name in model.state_dict():
        leaf = re.sub(r"^(layers|mtp)\.\d+\.", "", name)
        if name in ("embed.weight", "head.weight"):
            assert quantised.stored_format(name, experts) == "bf16"
            continue
        seen.add(leaf)
        assert quantised.stored_format(name, experts) == wanted[leaf], name
    assert seen == set(wanted)
    assert quantised.stored_format("layers.3.ffn.experts.17.w2.weight", experts) == experts
    assert quantised.stored_format("layers.3.engram.wkv.weight", experts) == "fp32"  # not in the released models


@pytest.mark.parametrize("rounding", ["none", "v4", "v4-inputs"])
@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_nothing_reaches_past_the_rounding(model: Transformer, experts, rounding):
    """Prefill, decoding through the few-token path, MTP and the loss equal a plain model with the rounded weights."""
    quantised.quantise(model, experts)
    quantised.round_activations(model, rounding)
    plain = baked(model, rounding)
    labels = torch.where(TOKENS % 5 == 0, IGNORE, TOKENS)
    results = []
    for m in (model, plain):
        with torch.no_grad():
            streams = m.forward_streams(TOKENS, trace=Trace(router=True))
            hidden = m.final_hidden(streams)
            mtp = m.mtp_hidden(m.mtp_streams(streams, next_tokens(TOKENS)))
            loss = cross_entropy_sum(hidden, m.head.weight, labels)
            results.append((m(TOKENS), decoded(m, TOKENS[:, :9]), m.logits(mtp), loss))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    with_grad = model(TOKENS)
    assert with_grad.requires_grad and torch.equal(with_grad, plain(TOKENS))


def test_gradients_of_masters_are_those_of_the_rounded_weights(model: Transformer):
    quantised.quantise(model, "fp4")
    quantised.round_activations(model, "v4")
    plain = baked(model, "v4")
    for m in (model, plain):
        trace = Trace(index_loss=True, router=True)
        streams = m.forward_streams(TOKENS, trace=trace)
        loss = m.logits(m.final_hidden(streams)).logsumexp(-1).sum()
        loss = loss + m.logits(m.mtp_hidden(m.mtp_streams(streams, next_tokens(TOKENS)))).logsumexp(-1).sum()
        (loss + torch.stack(trace.index_losses).sum()).backward()
    theirs = dict(plain.named_parameters())
    for name, master in model.named_parameters():
        assert master.grad is not None and master.grad.any(), f"{name} gets no gradient"
        assert torch.equal(master.grad, theirs[name].grad), name


def test_each_weight_is_rounded_once_until_it_changes(model: Transformer, monkeypatch):
    calls = []

    def counted(weight: Tensor, kind: str) -> Tensor:
        calls.append(kind)
        return fake_quant.rounded_weight(weight, kind)

    monkeypatch.setattr(quantised, "rounded_weight", counted)
    quantised.quantise(model, "fp4")
    for _ in range(3):
        model(TOKENS).sum().backward()
    formats = {name: quantised.stored_format(name, "fp4") for name, _ in model.named_parameters()}
    trunk = [kind for name, kind in formats.items() if kind != "fp32" and not name.startswith("mtp.")]
    assert sorted(calls) == sorted(trunk)
    with torch.no_grad():
        model.layers[1].attn.wq_a._parameters["weight"].add_(0.5)
    expected = fake_quant.rounded_weight(model.layers[1].attn.wq_a._parameters["weight"].detach(), "fp8")
    assert torch.equal(model.layers[1].attn.wq_a.weight, expected)
    assert len(calls) == len(trunk) + 1
    master = model.layers[1].attn.wq_a._parameters["weight"]
    master.data.mul_(2)  # behind the version counter's back, as another process would
    assert torch.equal(model.layers[1].attn.wq_a.weight, expected)
    quantised.forget(model)
    assert torch.equal(model.layers[1].attn.wq_a.weight, 2 * expected)


def test_masters_stay_and_release_gives_them_back(model: Transformer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(TOKENS)
    quantised.quantise(model, "fp4")
    quantised.quantise(model, "fp8")
    quantised.quantise(model, "fp4")
    quantised.round_activations(model, "v4-inputs")
    assert quantised.is_quantised(model) and isinstance(model.layers[0].attn.wq_a, Linear)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [n for n, _ in model.named_parameters()] == [n for n in before if n in dict(model.named_parameters())]
    with torch.no_grad():
        assert not torch.equal(model(TOKENS), logits)
    quantised.release(model)
    quantised.round_activations(model, "none")
    assert not quantised.is_quantised(model) and quantised.used_values(model) == {}
    assert type(model.layers[0].attn.wq_a) is Linear
    with torch.no_grad():
        assert torch.equal(model(TOKENS), logits)


def test_copies_and_inference_mode_do_not_disturb_training(model: Transformer):
    quantised.quantise(model, "fp4")
    with torch.inference_mode():
        logits = model(TOKENS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0].ffn.experts._parameters["w1"].zero_()
        assert not torch.equal(twin(TOKENS), logits)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), logits)
    loss = model(TOKENS)  # the copies rounded under inference_mode must be fit for a backward pass
    torch.testing.assert_close(loss, logits)
    loss.sum().backward()
    assert model.layers[0].ffn.experts._parameters["w1"].grad is not None


def test_error_by_group_is_that_of_the_formats(model: Transformer):
    quantised.quantise(model, "fp4")
    error = quantised.quantisation_error(model)
    assert error.keys() == {"experts", "fp8", "bf16", "mtp_experts", "mtp_fp8"}
    masters = [
        p.detach().flatten() for n, p in model.named_parameters() if re.fullmatch(r"layers.\d.ffn.experts.w\d", n)
    ]
    used = quantised.used_values(model)
    values = [used[n].flatten() for n, _ in model.named_parameters() if re.fullmatch(r"layers.\d.ffn.experts.w\d", n)]
    exact, rounded = torch.cat(masters), torch.cat(values)
    assert error["experts"] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-4)
    assert 0.05 < error["experts"] < 0.2 and 0.01 < error["fp8"] < 0.05 and error["bf16"] < 0.005
    quantised.quantise(model, "fp8")
    assert quantised.quantisation_error(model)["experts"] < 0.05


def test_activation_rounding_can_come_from_the_config():
    cfg = CONFIG.replace(activation_rounding="v4-inputs")
    from_config, changed = build(cfg), build(CONFIG)
    quantised.round_activations(changed, "v4-inputs")
    assert changed.cfg == cfg
    with torch.no_grad():
        assert torch.equal(from_config(TOKENS), changed(TOKENS))
    assert torch.equal(decoded(from_config, TOKENS[:, :7]), decoded(changed, TOKENS[:, :7]))
    shared = from_config.layers[0].ffn.shared_experts
    x = torch.randn(3, 160)
    assert torch.equal(shared.w1(x), shared.w1(quant.round_act_fp8(x)))
    compressor = from_config.layers[1].attn.compressor  # reads what it is given
    assert not torch.equal(compressor.wkv(x), compressor.wkv(quant.round_act_fp8(x)))


def test_rounded_inputs_are_refused_where_experts_are_exchanged(model: Transformer):
    model.layers[1].ffn.exchange = lambda *_: torch.empty(0)
    with pytest.raises(
        ConfigError, match="experts are spread over processes.*Set qat.activations=false or parallel.ep=1"
    ):
        quantised.round_activations(model, "v4-inputs")
    section = QatSection(mode="fp4", activations=True, start=0.9)
    with pytest.raises(ConfigError, match="experts are spread over processes"):  # before a token is trained on
        Qat(model, section, 1000)
    quantised.round_activations(model, "v4")
    Qat(model, QatSection(mode="fp4"), 1000)
    model.cfg = model.cfg.replace(activation_rounding="v4-inputs")
    with pytest.raises(ConfigError, match="experts are spread over processes"):
        Qat(model, QatSection(), 1000)


def test_rows_of_odd_length_are_refused_before_anything_changes():
    model = build(config(moe_intermediate_size=15))
    with pytest.raises(ConfigError, match=r"layers.0.ffn.experts.w2 has rows of 15, but FP4 packs two .* even"):
        quantised.quantise(model, "fp4")
    assert not quantised.is_quantised(model)
    quantised.quantise(model, "fp8")
