"""The router-bias rule and balanced hash tables."""

import torch

from rorqual.train.routing import (
    build_hash_table,
    install_hash_tables,
    max_violation,
    router_biases,
    update_bias,
)


def test_bias_rule_balances_skewed_scores() -> None:
    experts, top_k, speed, spread = 8, 2, 0.002, 0.4
    generator = torch.Generator().manual_seed(0)
    skew = torch.linspace(0, spread, experts)
    bias = torch.zeros(experts)
    violations = []
    for _ in range(int(2 * spread / speed)):
        scores = skew + 0.1 * torch.randn(4096, experts, generator=generator)
        chosen = (scores + bias).topk(top_k, dim=1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        violations.append(max_violation(counts))
        update_bias(bias, counts, speed)
    assert violations[0] > 1.0
    assert sum(violations[-20:]) / 20 < 0.1


def test_bias_moves_by_the_sign_only() -> None:
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10.0, 20.0, 30.0, 20.0]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([0.1, 0.0, -0.1, 0.0]))
    update_bias(bias, torch.full((4,), 7.0), 0.1)
    torch.testing.assert_close(bias, torch.tensor([0.1, 0.0, -0.1, 0.0]))


def test_max_violation() -> None:
    assert max_violation(torch.tensor([5, 5, 5, 5])) == 0.0
    assert max_violation(torch.tensor([20, 0, 0, 0])) == 3.0
    assert max_violation(torch.zeros(4)) == 0.0


def zipf(vocab: int) -> torch.Tensor:
    return 1e6 / torch.arange(1, vocab + 1)


def load(table: torch.Tensor, counts: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(experts).index_add_(0, table.flatten(), counts.repeat_interleave(table.shape[1]))


def test_hash_table_is_as_balanced_as_the_commonest_token_allows() -> None:
    vocab, experts, top_k = 2048, 16, 2
    counts = zipf(vocab)
    table = build_hash_table(counts, experts, top_k, seed=3)
    assert table.shape == (vocab, top_k) and table.dtype == torch.int64
    assert (table[:, 0] != table[:, 1]).all() and table.min() >= 0 and table.max() < experts
    floor = max(counts.max().item() / counts.sum().item() * experts / top_k - 1, 0.0)
    assert max_violation(load(table, counts, experts)) < floor + 0.02
    random = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:2] for i in range(vocab)]
    )
    assert max_violation(load(random, counts, experts)) > 4 * floor + 0.1


def test_tokens_never_seen_spread_evenly() -> None:
    table = build_hash_table(torch.zeros(800), 8, 2, seed=0)
    assert max_violation(torch.bincount(table.flatten(), minlength=8)) < 0.02


def test_tables_differ_by_seed_and_repeat_for_one() -> None:
    counts = zipf(256)
    assert torch.equal(build_hash_table(counts, 8, 2, 1), build_hash_table(counts, 8, 2, 1))
    assert not torch.equal(build_hash_table(counts, 8, 2, 1), build_hash_table(counts, 8, 2, 2))


def test_tables_are_installed_in_every_hash_layer() -> None:
    from rorqual.config import ModelConfig
    from rorqual.model import Transformer

    cfg = ModelConfig.preset("minke").replace(vocab_size=300, num_hash_layers=2)
    model = Transformer(cfg)
    names = install_hash_tables(model, zipf(290), seed=1)
    assert names == ["layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"]
    first, second = (model.get_buffer(name) for name in names)
    assert not torch.equal(first, second)
    assert sorted(router_biases(model)) == [*(f"layers.{i}.ffn.gate" for i in range(2, 6)), "mtp.0.ffn.gate"]
