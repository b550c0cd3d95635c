"""Expert ids given from outside: used in place of selection, with gradients to routers and experts, or refused."""

import pytest
import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import RequestError
from rorqual.model import Layout, Trace, Transformer
from rorqual.model.moe import MoE
from rorqual.train import losses
from rorqual.train.anticipatory import narrow, route_only
from rorqual.train.feed import Rows

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = ModelConfig.preset("minke").replace(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0, 0),
    n_routed_experts=6,
    moe_intermediate_size=32,
    sliding_window=8,
    index_topk=2,
    num_hash_layers=1,
    num_nextn_predict_layers=2,
)
LEARNED = ["layers.1.ffn.gate", "layers.2.ffn.gate", "mtp.0.ffn.gate", "mtp.1.ffn.gate"]


@pytest.fixture
def model() -> Transformer:
    return Transformer(CFG, seed=0).train()


def rows() -> Rows:
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(tokens, losses.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    return Rows(tokens, labels, torch.zeros_like(tokens))


def loss_weights(batch: Rows) -> losses.LossWeights:
    counts = [int((target != losses.IGNORE).sum()) for target in losses.mtp_targets(batch, 2)]
    assert counts == [2 * 22, 2 * 21]
    return losses.LossWeights(0.3, 1e-2, 1.0, 2 * 23, counts[0], 1.0, 1.0, (counts[1],))


def gradients(model: Transformer, batch: Rows) -> tuple[float, dict[str, Tensor], losses.LossParts]:
    model.zero_grad()
    loss, parts = losses.compute(model, batch, loss_weights(batch), dense=False)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, parts


def with_experts(batch: Rows, experts: dict[str, Tensor]) -> Rows:
    return Rows(batch.tokens, batch.labels, batch.segment_ids, batch.lengths, experts)


def test_ids_of_now_change_nothing_bit_for_bit(model: Transformer) -> None:
    batch = rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    ids = route_only(model, batch, dense=False)
    assert sorted(ids) == LEARNED and model.training
    assert all(value.dtype == torch.uint8 and value.shape == (2, 24, CFG.num_experts_per_tok) for value in ids.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    live = gradients(model, batch)
    forced = gradients(model, with_experts(batch, ids))
    assert forced[0] == live[0] and forced[2] == live[2]
    assert forced[1].keys() == live[1].keys()
    assert all(torch.equal(forced[1][name], live[1][name]) for name in live[1])


def test_other_ids_are_used_and_everything_still_learns(model: Transformer) -> None:
    batch = rows()
    ids = {name: (value + 1) % CFG.n_routed_experts for name, value in route_only(model, batch, dense=False).items()}
    loss, found, parts = gradients(model, with_experts(batch, ids))
    assert loss != gradients(model, batch)[0]
    for name, value in ids.items():
        counts = torch.bincount(value.flatten().long(), minlength=CFG.n_routed_experts)
        assert parts.router_counts[name] == counts.tolist()
        used = counts > 0
        prefix = name.removesuffix(".gate")
        assert found[f"{name}.weight"].abs().sum() > 0
        assert torch.equal(found[f"{prefix}.experts.w2"].abs().sum((1, 2)) > 0, used)


def test_gradients_at_forced_ids_are_those_of_finite_differences() -> None:
    """The weights at forced ids are a smooth function of the router, also where selection would choose otherwise."""
    draw = torch.Generator().manual_seed(0)
    layer = MoE(CFG, CFG.layers[1], "layers.1.ffn")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
    x, probe = torch.randn(2, 8, 32, generator=draw), torch.randn(2, 8, 32, generator=draw)
    ids = torch.rand(2, 8, 6, generator=draw).argsort(-1)[..., :2]
    tokens, layout = torch.zeros(2, 8, dtype=torch.int64), Layout(2, 8, torch.device("cpu"))
    trace = Trace(forced={"layers.1.ffn.gate": ids})

    def value() -> Tensor:
        return (layer(x, tokens, layout, trace) * probe).sum()

    value().backward()
    direction = torch.randn(6, 32, generator=draw)
    step = 1e-2
    with torch.no_grad():
        layer.gate.weight.add_(direction, alpha=step)
        high = value()
        layer.gate.weight.sub_(direction, alpha=2 * step)
        low = value()
    assert layer.gate.weight.grad is not None
    expected = (layer.gate.weight.grad * direction).sum()
    torch.testing.assert_close((high - low) / (2 * step), expected, rtol=1e-2, atol=1e-3)
    assert expected.abs() > 0.1


def test_replay_reproduces_logits_recorded_with_other_router_weights(model: Transformer) -> None:
    tokens = rows().tokens
    model.eval()
    trace = Trace(router=True, router_ids=True)
    with torch.no_grad():
        model(tokens, trace=trace)
        model.layers[1].ffn.gate.bias.add_(torch.randn(6) * 5)
        moved = Trace(router=True, router_ids=True)
        live = model(tokens, trace=moved)
        recorded = {record.name: record.experts for record in moved.routers if record.experts is not None}
        model.layers[1].ffn.gate.bias.zero_()
        assert not torch.equal(model(tokens), live)
        assert torch.equal(model(tokens, trace=Trace(forced=recorded)), live)
    assert [record.is_hash for record in moved.routers] == [True, False, False]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids.pop("layers.2.ffn.gate"), r"no experts for the router layers.2.ffn.gate, only for .*mtp.0"),
        (
            lambda ids: ids.update({LEARNED[0]: ids[LEARNED[0]][:1]}),
            r"has shape \(1, 24, 2\).*needs whole numbers \(2, 24",
        ),
        (lambda ids: ids.update({LEARNED[0]: ids[LEARNED[0]].float()}), r"dtype torch.float32"),
        (lambda ids: ids.update({LEARNED[0]: ids[LEARNED[0]] + 6}), r"ids from 6 to \d+, but the layer has 6 experts"),
        (lambda ids: ids.clear(), r"only for none"),
    ],
)
def test_ids_that_do_not_fit_are_refused(model: Transformer, damage: object, message: str) -> None:
    ids = route_only(model, rows(), dense=False)
    damage(ids)  # type: ignore[operator]
    with pytest.raises(RequestError, match=message):
        gradients(model, with_experts(rows(), ids))


def test_ids_travel_with_their_rows_and_are_stored_narrow() -> None:
    ids = torch.arange(24).view(4, 3, 2)
    batch = Rows(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64), experts={"a": ids})
    part = batch.part(1, 3).to(torch.device("cpu"))
    assert part.experts is not None and torch.equal(part.experts["a"], ids[1:3])
    assert [narrow(ids, n).dtype for n in (256, 257, 1 << 15, (1 << 15) + 1)] == [
        torch.uint8,
        torch.int16,
        torch.int16,
        torch.int32,
    ]
    assert torch.equal(narrow(torch.tensor([255]), 256).long(), torch.tensor([255]))
