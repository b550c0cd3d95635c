"""Bounds by hand on a machine of round figures, the table of hardware, and published claims against the bounds."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.planner.bounds import (
    PREFILL_TOKENS,
    batch_within,
    chips_needed,
    decode_bound,
    exchange_bytes,
    max_batch,
    prefill_bound,
)
from rorqual.planner.compare import price_claims, speed_claims
from rorqual.planner.hardware import Chip, Machine, find_machine, load_hardware
from rorqual.planner.plan import Costs, Workload, fit, make_plan
from rorqual.planner.work import Experts, Operations, WeightBytes, Work

CHIP = Chip(name="round", memory=1e6, bandwidth=1e4, bf16=1e6, fp8=2e6, link=1e3, source="invented here")


@dataclass
class Round:
    """A network of round figures: 2 layers of 4 experts, 1 chosen."""

    name: str = "round"
    weights: WeightBytes = dataclasses.field(default_factory=lambda: WeightBytes(1000, 8000, 500, 500))
    experts: Experts = dataclasses.field(default_factory=lambda: Experts(2, 4, 1, 10, 20))

    def decode(self, context: int) -> Work:
        return Work((Operations("linear", "fp8", 4000.0), Operations("core", "bf16", 2.0 * context)))

    def prefill(self, num_tokens: int) -> Work:
        return Work((Operations("linear", "fp8", 4000.0), Operations("core", "bf16", 1.0 * num_tokens)))

    def cache_bytes(self, context: int) -> int:
        return 100 * context

    def cache_read(self, context: int) -> int:
        return 10 * context

    def cache_per_token(self) -> float:
        return 100.0


def test_a_decoding_step_by_hand() -> None:
    bound = decode_bound(Round(), Machine(CHIP, 1), 50, 1)
    # one token reads a fourth of the experts; 4000 at 2e6 a second and 100 at 1e6
    assert bound.seconds_by_resource == {
        "memory bandwidth": pytest.approx((1000 + 8000 / 4 + 500) / 1e4),
        "arithmetic": pytest.approx(4000 / 2e6 + 100 / 1e6),
    }
    assert bound.binding == "memory bandwidth" and bound.tokens_per_s == pytest.approx(1 / 0.35)
    many = decode_bound(Round(), Machine(CHIP, 2), 50, 3)
    share = 1 - (3 / 4) ** 3
    assert many.seconds_by_resource == {
        "memory bandwidth": pytest.approx((1000 + 8000 * share + 3 * 500) / 2e4),
        "arithmetic": pytest.approx(3 * (4000 / 2e6 + 100 / 1e6) / 2),
        # half of the tokens' vectors travel: 10 channels, 1 byte there and 2 back, in two layers
        "interconnect": pytest.approx(3 * 2 * 0.5 * 10 * 3 / (2 * 1e3)),
    }


def test_each_resource_binds_where_it_is_scarce() -> None:
    for change, binding in (
        ({"bandwidth": 1.0}, "memory bandwidth"), ({"bf16": 1.0}, "arithmetic"), ({"link": 0.1}, "interconnect")
    ):  # fmt: skip
        scarce = Machine(CHIP.model_copy(update=change), 2)
        assert decode_bound(Round(), scarce, 50, 2).binding == binding
        assert prefill_bound(Round(), scarce, 50).binding == binding


def test_a_prompt_reads_the_weights_once_a_step() -> None:
    bound = prefill_bound(Round(), Machine(CHIP, 1), PREFILL_TOKENS + 1)
    nbytes = (1000 + 8000) + (1000 + 8000 / 4) + 100 * (PREFILL_TOKENS + 1)
    assert bound.seconds_by_resource["memory bandwidth"] == pytest.approx(nbytes / 1e4)
    assert bound.num_tokens == PREFILL_TOKENS + 1


def test_vectors_travel_once_to_a_chip() -> None:
    wide = Round(experts=Experts(1, 64, 6, 10, 20))
    assert exchange_bytes(wide, 1) == 0
    assert exchange_bytes(wide, 2) == pytest.approx((1 - 0.5**6) * 10 * 3)
    assert exchange_bytes(wide, 10_000) == pytest.approx(6 * 10 * 3, rel=1e-3)


def test_capacity() -> None:
    machine = Machine(CHIP, 1)
    assert max_batch(Round(), machine, 100, 0.0) == (1_000_000 - 10_000) // 10_000
    assert max_batch(Round(), machine, 100, 0.5) == (500_000 - 10_000) // 10_000
    assert chips_needed(Round(), machine, 100, 0.0) == 1 and chips_needed(Round(), machine, 100_000, 0.0) == 11
    large = Round(weights=WeightBytes(1000, 2_000_000, 500, 500))
    found = fit(large, Workload(100), machine, 0.0, 1.0)
    assert (found.max_batch, found.batch, found.limited_by, found.decode) == (0, 0, "capacity", None)
    asked = fit(Round(), Workload(100, batch=100), machine, 0.0, None)
    assert asked.max_batch == 99 and asked.batch == 0 and asked.limited_by == "capacity"
    assert asked.decode is None and asked.alone == decode_bound(Round(), machine, 100, 1) and asked.prefill is not None
    # a cache that is hardly read: twice the sequences would give more
    roomy = fit(
        Round(), Workload(100), Machine(CHIP.model_copy(update={"memory": 3e4, "bandwidth": 1.0}), 1), 0.0, None
    )
    assert roomy.batch == 2 and roomy.limited_by == "capacity"
    assert roomy.decode is not None and roomy.decode.binding == "memory bandwidth"


def test_the_time_between_tokens_limits_the_batch() -> None:
    machine, limit = Machine(CHIP, 1), 2.0
    found = fit(Round(), Workload(100, tpot_s=limit), machine, 0.0, None)
    assert found.decode is not None and found.decode.seconds <= limit
    assert decode_bound(Round(), machine, 100, found.batch + 1).seconds > limit
    assert found.batch == batch_within(Round(), machine, 100, limit, 99) < 99
    never = fit(Round(), Workload(100, tpot_s=1e-6), machine, 0.0, 1.0)
    assert never.batch == 0 and never.decode is None and never.limited_by == "memory bandwidth" and never.costs is None


def test_costs_follow_from_speeds() -> None:
    work = Workload(100, batch=10, cache_hit=0.75, output_share=0.2)
    found = fit(Round(), work, Machine(CHIP, 2), 0.0, 3600.0)
    assert found.decode is not None and found.prefill is not None and found.costs is not None
    assert found.costs.output == pytest.approx(1e6 * 2 / found.decode.tokens_per_s)
    assert found.costs.miss == pytest.approx(1e6 * 2 / found.prefill.tokens_per_s)
    assert found.costs.mean == pytest.approx(0.8 * 0.25 * found.costs.miss + 0.2 * found.costs.output)


@pytest.mark.parametrize(
    "wrong",
    [
        {"context": 0},
        {"batch": 0},
        {"tpot_s": -1.0},
        {"tpot_s": 0.0},
        {"tpot_s": math.nan},
        {"tpot_s": math.inf},
        {"cache_hit": 1.5},
        {"output_share": -1},
    ],
)
def test_work_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Workload(**{"context": 1, **wrong})


def test_a_whole_plan() -> None:
    cfg = ModelConfig.preset("minke")
    found = make_plan(cfg, "minke", Workload(4096), find_machine("2xh200"), weights="bf16", usd_per_hour=1.0)
    ours, v32, gqa = found.networks
    assert [network.name for network in found.networks] == ["minke", "DeepSeek-V3.2", "GQA-8"]
    assert ours.weights.total == found.stored.nbytes
    assert v32.fit is not None and (v32.fit.max_batch, v32.fit.limited_by) == (0, "capacity")
    assert gqa.fit is not None and ours.fit is not None and 0 < gqa.fit.max_batch < ours.fit.max_batch
    assert found.link_bytes_per_s == pytest.approx(1978.9e12 / (6 * 128 * cfg.moe_intermediate_size / (128 * 3)))
    with pytest.raises(ConfigError, match="positions"):
        make_plan(cfg, "minke", Workload(cfg.max_position_embeddings + 1))
    with pytest.raises(ConfigError, match="reserve"):
        make_plan(cfg, "minke", Workload(8), reserve=1.0)
    for price in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="usd_per_hour"):
            make_plan(cfg, "minke", Workload(8), usd_per_hour=price)


# ---------------------------------------------------------------- data


def test_every_chip_has_a_source_and_names_its_estimates() -> None:
    chips = load_hardware()
    assert {"h100", "h200", "b200", "mi300x", "ascend-910c", "ascend-950dt", "laptop"} <= chips.keys()
    for key, chip in chips.items():
        assert any(year in chip.source for year in ("2023", "2024", "2025", "2026")), (
            f"{key} has a source without a date"
        )
        assert all(getattr(chip, name) is not None for name in chip.estimated), key
        assert chip.rate("bf16") <= chip.rate("fp8") <= chip.rate("fp4"), key
        assert (chip.usd_per_hour is None) == (not chip.price_source), key
    assert chips["h200"].rate("fp4") == chips["h200"].fp8 and chips["laptop"].rate("fp8") == chips["laptop"].bf16


def test_machines_by_name(tmp_path: Path) -> None:
    assert find_machine("8xH200") == Machine(load_hardware()["h200"], 8)
    assert find_machine("laptop").count == 1 and find_machine(" 64 x ascend-950dt ").count == 64
    for wrong, words in (("8xnone", "no hardware"), ("8x", "no hardware"), ("0xh100", "at least one"),
                         ("9" * 400 + "xh100", "no hardware"),
                         ("2xlaptop", "no figure for its links")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            find_machine(wrong)
    mine = tmp_path / "mine.toml"
    mine.write_text('[mine]\nname="m"\nmemory=1e9\nbandwidth=1e9\nbf16=1e12\nsource="me"\n')
    assert find_machine("mine", load_hardware(mine)).chip.memory == 1e9
    for text, words in (
        ("[mine]\nname=1", "mine|name"),
        (mine.read_text().replace("memory=1e9", "memory=inf"), "memory: .*finite"),
        ("not toml [", "no table of hardware"),
    ):
        broken = tmp_path / f"{len(text)}.toml"
        broken.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_hardware(broken)


@pytest.mark.slow
def test_published_speeds_lie_below_the_bounds() -> None:
    found = speed_claims(("v4-flash", "v4-pro"))
    for claim in found:
        assert 0 < claim.share < 1, claim
    [ascend] = [claim for claim in found if claim.model == "v4-pro" and claim.tpot_ms == 20]
    assert (ascend.claimed, ascend.context) == (4700, 8192) and "Ascend 950" in ascend.source and ascend.assumed
    assert ascend.bound == pytest.approx(8099, rel=0.01)


def test_published_prices() -> None:
    sixth, fiftieth = price_claims("v4-pro", Costs(miss=1.0, output=2.0, mean=1.1))
    assert sixth.claim == "1/6" and sixth.by_list == pytest.approx((5 + 25) / (1.74 + 3.48))
    assert sixth.by_plan == pytest.approx(30 / 3)
    assert fiftieth.claim == "1/50" and fiftieth.by_list == pytest.approx(180 / 3.48)
    assert fiftieth.by_plan == pytest.approx(180 / 2)
    assert [one.by_plan for one in price_claims("v4-pro", None)] == [None, None] and not price_claims("minke", None)
