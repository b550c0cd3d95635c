"""The interconnect a chip needs, from the presets' own numbers."""

import pytest

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.planner import expert_bandwidth

PRESETS = ("minke", "blue", "v4-flash", "v4-pro")


def by_hand(config: ModelConfig, element_bytes: float) -> float:
    """Operations of the three products of one token at one expert, per byte of its vector there and back."""
    matrices = [
        (config.moe_intermediate_size, config.hidden_size),
        (config.moe_intermediate_size, config.hidden_size),
        (config.hidden_size, config.moe_intermediate_size),
    ]
    return sum(2 * rows * columns for rows, columns in matrices) / (config.hidden_size * element_bytes)


@pytest.mark.parametrize("name", PRESETS)
def test_operations_per_byte_come_from_the_products(name: str) -> None:
    config = ModelConfig.preset(name)
    assert expert_bandwidth(config).flops_per_byte == pytest.approx(by_hand(config, 1 + 2))
    assert expert_bandwidth(config, dispatch="bf16").flops_per_byte == pytest.approx(by_hand(config, 2 + 2))
    everything = expert_bandwidth(config, dispatch="fp32", combine="fp32")
    assert everything.flops_per_byte == pytest.approx(by_hand(config, 4 + 4))


def test_the_reports_figures() -> None:
    """V4 report: 6,144 FLOP/B for Pro, or 6.1 TFLOP/s for each GB/s; by the same rule 4,096 for Flash."""
    pro, flash = (expert_bandwidth(ModelConfig.preset(name)) for name in ("v4-pro", "v4-flash"))
    assert pro.flops_per_byte == 6144 and flash.flops_per_byte == 4096
    assert round(pro.tflops_per_s_per_gb_per_s, 1) == 6.1 and round(flash.tflops_per_s_per_gb_per_s, 1) == 4.1


def test_a_chip_needs_its_rate_over_the_balance() -> None:
    config = ModelConfig.preset("v4-pro")
    needed = expert_bandwidth(config, peak_flops_per_s=2e15).gb_per_s
    assert needed is not None
    seconds_computing = 3 * 2 * config.hidden_size * config.moe_intermediate_size / 2e15
    seconds_travelling = 3 * config.hidden_size / (needed * 1e9)
    assert seconds_travelling == pytest.approx(seconds_computing)
    assert expert_bandwidth(config).gb_per_s is None


def test_the_models_width_cancels_and_the_experts_does_not() -> None:
    config = ModelConfig.preset("minke")
    before = expert_bandwidth(config).flops_per_byte
    assert expert_bandwidth(config.replace(hidden_size=4 * config.hidden_size)).flops_per_byte == before
    wider = config.replace(moe_intermediate_size=2 * config.moe_intermediate_size)
    assert expert_bandwidth(wider).flops_per_byte == 2 * before


def test_scales_and_the_backward_pass_count() -> None:
    config = ModelConfig.preset("v4-pro")
    h = config.hidden_size
    assert expert_bandwidth(config, scale_group=128).nbytes == 3 * h + h / 128
    assert expert_bandwidth(config, scale_group=128, scale="fp32").nbytes == 3 * h + 4 * h / 128
    training = expert_bandwidth(config, passes="training")
    assert training.flops == 3 * expert_bandwidth(config).flops and training.nbytes == 3 * h + 2 * 2 * h


@pytest.mark.parametrize(
    "wrong",
    [{"dispatch": "int3"}, {"scale": "none"}, {"passes": "backward"}, {"scale_group": -1}, {"peak_flops_per_s": 0}],
)
def test_figures_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        expert_bandwidth(ModelConfig.preset("minke"), **wrong)
