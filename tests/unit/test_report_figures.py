"""The V4 report's efficiency figures from the configurations, each part against the formula written out by hand."""

import dataclasses

import pytest

from rorqual.config import ModelConfig
from rorqual.planner import GQA8, V4, V32, count_parameters, efficiency, report_figures
from rorqual.planner.report import FP8_EQUIVALENT, Figure, fp8_equivalent, report_networks

MILLION = 10**6
FIGURES = report_figures()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.model} {figure.what} {figure.claim}")
def test_a_figure_rounds_to_what_is_printed(figure: Figure) -> None:
    assert figure.agrees, f"{figure.model}: {figure.what} is {figure.rounded} ({figure.value}), printed {figure.claim}"


def test_every_claim_of_the_report_is_there() -> None:
    printed = {(figure.model, figure.what.split(",")[0], figure.claim) for figure in FIGURES}
    assert printed >= {
        ("v4-pro", "operations a token", "27.0%"), ("v4-flash", "operations a token", "10.2%"),
        ("v4-pro", "cache", "10.5%"), ("v4-flash", "cache", "7.3%"), ("v4-pro", "cache", "2.0%"),
        ("v4-flash", "cache", "2.0%"), ("v4-flash", "cache", "13.7x"), ("v4-pro", "cache", "9.5x"),
        ("v4-pro", "operations a token", "3.7x"), ("v4-flash", "operations a token", "9.8x"),
    }  # fmt: skip


def test_a_figure_that_does_not_round_to_the_claim_disagrees() -> None:
    assert Figure("m", "w", "27.0%", 0.26949).rounded == "26.9%" and not Figure("m", "w", "27.0%", 0.26949).agrees
    assert Figure("m", "w", "9.5x", 9.5535).rounded == "9.6x" and not Figure("m", "w", "9.5x", 9.5535).agrees
    assert Figure("m", "w", "27%", 0.26949).agrees and Figure("m", "w", "2.0%", 0.0197).agrees


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
def test_v4_by_hand(preset: str) -> None:
    """Weights by the formula of the architecture document, keys and scores by kind of layer."""
    c = ModelConfig.preset(preset)
    network = report_networks()[preset]
    csa = sum(spec.kind == "csa" for spec in c.layers)
    hca = sum(spec.kind == "hca" for spec in c.layers)
    layers, d, heads, q = c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.q_lora_rank
    per_layer = d * q + 512 * q * heads + 512 * d + 1024 * 512 * heads + 1024 * c.o_groups * d
    fp8 = layers * (per_layer + 3 * d * c.moe_intermediate_size * 7) + csa * 8192 * q
    bf16 = csa * (2 * 1024 * d + 2 * 256 * d + 64 * d) + hca * 2 * 512 * d + layers * c.n_routed_experts * d
    keys = 128 * layers + csa * min(c.index_topk, MILLION // 4) + hca * (MILLION // 128)
    work = network.decode(MILLION)
    found = {(part.part, part.number): part.flops for part in work}
    assert found["linear", "fp8"] == 2 * fp8 and found["linear", "bf16"] == 2 * bf16
    assert found["head", "bf16"] == 2 * c.vocab_size * d
    assert found["core", "bf16"] == 4 * 512 * heads * keys
    assert found["index", "fp4"] == csa * 2 * 64 * 128 * (MILLION // 4)
    total = 2 * fp8 + 2 * (2 * bf16 + 2 * c.vocab_size * d + found["core", "bf16"]) + found["index", "fp4"] / 2
    assert fp8_equivalent(work) == total
    assert sum(part.flops for part in work if part.part in ("linear", "head")) == pytest.approx(
        2 * count_parameters(c).activated, rel=0.003  # norms, biases and the streams' matrices apart
    )  # fmt: skip


def test_v3_2_by_hand() -> None:
    work = V32().decode(MILLION)
    found = {(part.part, part.number): part.flops for part in work}
    assert sum(part.flops for part in work if part.part in ("linear", "head")) == pytest.approx(2 * 37.476e9, rel=1e-5)
    assert found["core", "bf16"] == 61 * 2 * 128 * (576 + 512) * 2048
    assert found["index", "fp8"] == 61 * 2 * 64 * 128 * MILLION
    assert V32().cache_per_token() == 61 * (656 + 132) == 48_068
    assert V32().weights.total == pytest.approx(685.4e9, rel=0.001)  # its files hold 685 billion parameters, mostly FP8


@pytest.mark.parametrize(
    ("context", "pro", "flash"), [(4096, 81.1, 21.8), (1 << 17, 52.7, 15.7), (1 << 20, 26.71, 10.09)]
)
def test_other_lengths(context: int, pro: float, flash: float) -> None:
    """The same rule at the lengths of the architecture document, whose figures were computed apart."""
    base = efficiency(V32(), context).flops
    for preset, share in (("v4-pro", pro), ("v4-flash", flash)):
        digits = len(str(share).split(".")[1])
        assert round(100 * efficiency(report_networks()[preset], context).flops / base, digits) == share


def test_caches_a_token() -> None:
    found = {name: efficiency(network) for name, network in report_networks().items()}
    assert found["v4-flash"].cache_bytes_per_token == 3514.25
    assert found["v4-pro"].cache_bytes_per_token == 5031.4375
    assert found["gqa-8 of v4-flash"].cache_bytes_per_token == 43 * 4096
    assert found["gqa-8 of v4-pro"].cache_bytes_per_token == 61 * 4096
    assert found["v4-flash"].cache_bytes == 3514.25 * MILLION - 20 * 0.5 * 584 + 43 * 128 * 584  # half a block is open


def test_figures_follow_the_configuration() -> None:
    """Nothing is a constant: another schedule, another figure."""
    c = ModelConfig.preset("minke")
    more = c.replace(index_topk=c.index_topk + 1)
    csa = sum(spec.kind == "csa" for spec in c.layers)
    a, b = V4(c, "a").decode(MILLION), V4(more, "b").decode(MILLION)
    assert b.flops - a.flops == 4 * c.num_attention_heads * c.head_dim * csa
    assert b.in_format("bf16") - a.in_format("bf16") == b.flops - a.flops
    shallow = c.replace(num_hidden_layers=2, compress_ratios=c.compress_ratios[:2])
    assert GQA8(shallow).cache_per_token() == 2 * 4096
    assert set(FP8_EQUIVALENT) == {"fp4", "fp8", "bf16"}


def test_prompts_cost_the_mean_of_their_tokens() -> None:
    length = 700
    for network in (V4(ModelConfig.preset("minke"), "minke"), V32(), GQA8(ModelConfig.preset("minke"))):
        each = [network.decode(t + 1) for t in range(length)]
        for part in ("core", "index"):
            mean = sum(p.flops for work in each for p in work if p.part == part) / length
            found = sum(p.flops for p in network.prefill(length) if p.part == part)
            assert found == pytest.approx(mean), (network.name, part)
        rest = {(p.part, p.number): p.flops for p in each[0] if p.part in ("linear", "mixing")}
        assert {(p.part, p.number): p.flops for p in network.prefill(length) if p.part not in ("core", "index")} == rest


def test_share_of_experts_that_a_step_reads() -> None:
    experts = report_networks()["v4-flash"].experts
    assert experts.read_share(0) == 0 and experts.read_share(1) == pytest.approx(6 / 256)
    assert experts.read_share(10_000) == pytest.approx(1)
    every = dataclasses.replace(experts, chosen=experts.count)
    assert every.read_share(1) == 1
