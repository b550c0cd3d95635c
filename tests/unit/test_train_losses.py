"""The chunked cross-entropy against torch's, MTP labels, and the parts of the total loss."""

import pytest
import torch
import torch.nn.functional as F

from rorqual.config import ModelConfig
from rorqual.train import losses
from rorqual.train.feed import Rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_chunked_cross_entropy_equals_torch(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 8, generator=generator, requires_grad=True)
    weight = torch.randn(19, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 19, (3, 11), generator=generator)
    labels[0, 3:6] = losses.IGNORE
    found = losses.cross_entropy_sum(hidden, weight, labels, chunk=chunk)
    (found * 0.37).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    (expected * 0.37).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], weight.grad)


def test_chunked_cross_entropy_passes_gradcheck() -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, losses.IGNORE, 2])
    found = losses.cross_entropy_sum(hidden, weight, labels, chunk=2)
    found.backward()
    expected = F.cross_entropy(hidden.detach() @ weight.detach().T, labels, reduction="sum")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert hidden.grad is not None and torch.equal(hidden.grad[2], torch.zeros(3, dtype=torch.float64))


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((2, 4), 300.0, requires_grad=True)
    weight = torch.randn(6, 4) * 10
    found = losses.cross_entropy_sum(hidden, weight, torch.tensor([0, 1]))
    found.backward()
    assert torch.isfinite(found) and hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_no_gradient_is_formed_for_evaluation() -> None:
    with torch.no_grad():
        found = losses.cross_entropy_sum(torch.zeros(7, 4), torch.zeros(16, 4), torch.zeros(7, dtype=torch.int64))
    assert found.item() == pytest.approx(7 * torch.tensor(16.0).log().item(), rel=1e-6)


def test_mtp_labels_stay_within_a_document() -> None:
    #         document 0: a b c d | document 1: e f g
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    labels = torch.tensor([[11, 12, 13, -100, 15, 16, -100]])
    assert losses.mtp_labels(labels, segments).tolist() == [[12, 13, -100, -100, 16, -100, -100]]


def test_mtp_skips_masked_targets_but_not_what_follows_them() -> None:
    labels = torch.tensor([[-100, -100, 13, 14, -100]])  # a masked prompt, then its answer
    assert losses.mtp_labels(labels, torch.zeros(1, 5)).tolist() == [[-100, 13, 14, -100, -100]]


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    from rorqual.model import Transformer

    cfg = ModelConfig.preset("minke").replace(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128, 0),
        n_routed_experts=4,
        moe_intermediate_size=32,
        sliding_window=8,
        index_topk=2,
        num_hash_layers=1,
    )
    return Transformer(cfg, seed=0)


def rows() -> Rows:
    tokens = torch.randint(0, 64, (2, 160), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(2, 160, dtype=torch.int32)
    segments[1, 70:] = 1
    labels = torch.full_like(tokens, losses.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    labels[1, 69] = losses.IGNORE
    return Rows(tokens, labels, segments)


def weights(**changes: float) -> losses.LossWeights:
    base: dict[str, float] = {"mtp": 0.3, "balance": 1e-2, "index": 1.0, "row_share": 1.0, "index_share": 1.0}
    return losses.LossWeights(num_targets=317, num_mtp_targets=314, **{**base, **changes})


@pytest.mark.parametrize("dense", [True, False])
def test_parts_add_up_and_every_parameter_learns(tiny: torch.nn.Module, dense: bool) -> None:
    batch = rows()
    assert int((batch.labels != losses.IGNORE).sum()) == 317
    assert int((losses.mtp_labels(batch.labels, batch.segment_ids) != losses.IGNORE).sum()) == 314
    tiny.zero_grad()
    loss, parts = losses.compute(tiny, batch, weights(), dense=dense)
    loss.backward()
    total = parts.lm + 0.3 * parts.mtp + 1e-2 * parts.balance + parts.index
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert parts.lm == pytest.approx(4.16, abs=0.1) and parts.mtp == pytest.approx(4.16, abs=0.1)  # ln 64
    silent = [n for n, p in tiny.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    tokens_routed = {name: sum(counts) for name, counts in parts.router_counts.items()}
    assert tokens_routed == {f"{n}.ffn.gate": 640.0 for n in ("layers.0", "layers.1", "layers.2", "mtp.0")}


def test_only_the_index_loss_trains_indexers_and_nothing_else(tiny: torch.nn.Module) -> None:
    batch = rows()
    tiny.zero_grad()
    losses.compute(tiny, batch, weights(index=0.0), dense=False)[0].backward()
    indexer = [p for n, p in tiny.named_parameters() if ".indexer." in n]
    assert indexer and all(p.grad is None or not p.grad.any() for p in indexer)
    lm_only = {n: p.grad.clone() for n, p in tiny.named_parameters() if p.grad is not None and ".indexer." not in n}
    tiny.zero_grad()
    losses.compute(tiny, batch, weights(index=1.0), dense=False)[0].backward()
    for name, parameter in tiny.named_parameters():
        if name in lm_only:
            assert torch.equal(parameter.grad, lm_only[name]), name


def test_micro_batches_add_up_to_the_whole_batch(tiny: torch.nn.Module) -> None:
    batch = rows()
    assert losses.num_index_queries(batch) == 157 + 67 + 87
    tiny.zero_grad()
    losses.compute(tiny, batch, weights(), dense=False)[0].backward()
    whole = {n: p.grad.clone() for n, p in tiny.named_parameters()}
    tiny.zero_grad()
    for row in (0, 1):
        part = batch.part(row, row + 1)
        half = weights(row_share=0.5, index_share=losses.num_index_queries(part) / losses.num_index_queries(batch))
        losses.compute(tiny, part, half, dense=False)[0].backward()
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=2e-5, rtol=2e-3, msg=name)


def padded() -> Rows:
    """The rows of `rows`, each with 20 tokens of padding behind it."""
    batch = rows()
    width = batch.tokens.shape[1]
    # MTP reads a token ahead: without padding the last position reads its own token once more.
    tokens = torch.cat([batch.tokens, batch.tokens[:, -1:].expand(-1, 20)], 1)
    labels = torch.nn.functional.pad(batch.labels, (0, 20), value=losses.IGNORE)
    assert batch.segment_ids is not None
    segments = torch.cat([batch.segment_ids, torch.arange(2, 22, dtype=torch.int32).expand(2, -1)], 1)
    return Rows(tokens, labels, segments, (width, width))


@pytest.mark.parametrize("dense", [True, False])
def test_padding_counts_nowhere(tiny: torch.nn.Module, dense: bool) -> None:
    assert losses.num_index_queries(padded()) == losses.num_index_queries(rows())
    _, without = losses.compute(tiny, rows(), weights(), dense=dense)
    _, with_padding = losses.compute(tiny, padded(), weights(), dense=dense)
    assert with_padding.router_counts == without.router_counts
    for name in ("lm", "mtp", "balance", "index"):
        assert getattr(with_padding, name) == pytest.approx(getattr(without, name), rel=1e-5), name


def test_index_queries_are_those_that_see_an_entry() -> None:
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 2, 3, 4]])
    assert losses.num_index_queries(Rows(tokens, tokens, segments)) == 2 + 1 + 2
    assert losses.num_index_queries(Rows(tokens, tokens)) == 6 + 6
    assert losses.num_index_queries(Rows(tokens, tokens, None, (9, 2))) == 6
    assert losses.num_index_queries(Rows(tokens[:, :2], tokens[:, :2], segments[:, :2])) == 0
