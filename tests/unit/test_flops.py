"""Forward FLOPs per token: against counting by hand, against torch's own counter, and the known small recipes."""

from typing import Any

import pytest
import torch
from small_models import build, config, some_tokens
from torch.utils.flop_counter import FlopCounterMode

from rorqual.config import ModelConfig
from rorqual.ops import registry
from rorqual.planner import count_parameters, forward_flops

KINDS: list[dict[str, Any]] = [{}, {"residual": "hc"}, {"residual": "plain", "hc_mult": 1}]


def test_keys_are_counted_position_by_position() -> None:
    cfg, length = config(), 30  # window 8, CSA picks 3 of blocks of 4, HCA blocks of 8
    attention = index = 0
    for t in range(length):
        for ratio in cfg.compress_ratios:
            keys = sum(1 for s in range(length) if 0 <= t - s < 8)
            entries = [b for b in range(length) if ratio and (b + 1) * ratio - 1 <= t]
            attention += 4 * 4 * 24 * (keys + (min(len(entries), 3) if ratio == 4 else len(entries)))
            index += 2 * 4 * 16 * (len(entries) if ratio == 4 else 0)
    found = forward_flops(cfg, length)
    assert found.attention == pytest.approx(attention / length) and found.index == pytest.approx(index / length)
    assert found.weights == 2 * count_parameters(cfg).activated and found.mtp == 0


@pytest.mark.parametrize("changes", KINDS, ids=["mhc", "hc", "plain"])
def test_weights_agree_with_torch_counting_the_products(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token and a window of one: nothing but weights, one key, and the mixing of the streams.

    Torch counts matrix products only, so what else the residual path does is taken off: collapse, spread, Sinkhorn.
    """
    monkeypatch.setattr(registry, "_only", "reference")
    wide = {"hidden_size": 64, "vocab_size": 256, "sliding_window": 1, "num_nextn_predict_layers": 1}
    cfg = config(**wide, **changes, compress_ratios=[0, 0, 0], num_hidden_layers=2)
    model = build(cfg)
    tokens = some_tokens(model, 1, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as trunk:
        streams = model.forward_streams(tokens)
        model.logits(model.final_hidden(streams))
    with torch.no_grad(), FlopCounterMode(display=False) as mtp:
        model.logits(model.mtp_hidden(model.mtp_streams(streams, tokens)))
    ours, n, d = forward_flops(cfg, 1), cfg.hc_mult, cfg.hidden_size
    is_mhc, is_plain = cfg.residual == "mhc", cfg.residual == "plain"
    per_mix = d if is_plain else 4 * n * d + (4 * n * n * cfg.hc_sinkhorn_iters if is_mhc else 0)
    at_the_end = 0 if is_plain else 2 * n * d
    assert trunk.get_total_flops() == pytest.approx(ours.total - 4 * per_mix - at_the_end, rel=0.01)
    assert mtp.get_total_flops() == pytest.approx(ours.mtp - 2 * per_mix - at_the_end, rel=0.01)


def test_the_known_small_recipes() -> None:
    """Three reference recipes with their published counts, which round positions to min(window, T / 2) and so on."""
    minke = ModelConfig.preset("minke")
    small = minke.replace(
        vocab_size=512, compress_ratios=(0, 0, 4, 16, 4, 16, 0), sliding_window=32, index_n_heads=4, index_topk=16
    )
    middle = minke.replace(
        hidden_size=256, num_hidden_layers=8, num_attention_heads=8, q_lora_rank=128, o_groups=4,
        compress_ratios=(0, 0, 4, 32, 4, 32, 4, 32, 0), index_n_heads=4, index_head_dim=64, n_routed_experts=24,
        num_experts_per_tok=3, moe_intermediate_size=128, num_hash_layers=2,
    )  # fmt: skip
    large = minke.replace(
        vocab_size=8192, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, head_dim=128,
        qk_rope_head_dim=32, q_lora_rank=256, o_groups=4, o_lora_rank=128, compress_ratios=(0, 0) + (4, 64) * 5 + (0,),
        sliding_window=128, index_n_heads=8, index_head_dim=64, index_topk=64, n_routed_experts=24,
        num_experts_per_tok=4, moe_intermediate_size=192, num_hash_layers=2,
    )  # fmt: skip
    for cfg, length, published in ((small, 512, 3.17e6), (middle, 1024, 15.5e6), (large, 2048, 82.9e6)):
        found = forward_flops(cfg, length)
        assert found.total - found.mixing == pytest.approx(published, rel=0.01)


def test_wider_experts_cost_what_they_say() -> None:
    minke = ModelConfig.preset("minke")
    more = forward_flops(minke.replace(moe_intermediate_size=97), 512).total - forward_flops(minke, 512).total
    assert more == 2 * 6 * 3 * 3 * 128  # 2 a weight, 6 layers, 2 routed and 1 shared expert, 3 matrices of 128
