"""The efficiency figures of the V4 report, computed from configurations by the report's way of counting.

    tokens       10^6 in the sequence, one more generated
    operations   "FP8-equivalent": an FP8 product counts 1, a bf16 one 2, an FP4 one a half; the streams' mixing is left
                 out. The report does not spell its weights out; these reproduce its percentages and multipliers
    cache        packed rows and the window rings, without open blocks (pending)

What is printed in the report stands in `claims.toml`; a figure agrees when it rounds to what is printed.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig
from rorqual.planner.baselines import GQA8, V32
from rorqual.planner.work import V4, NumberFormat, Work

REPORT_TOKENS = 10**6
FP8_EQUIVALENT: Mapping[NumberFormat, float] = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0}


@dataclass(frozen=True)
class Figure:
    """One figure of the report, printed and computed."""

    model: str
    what: str
    claim: str
    """As printed: `27.0%`, `9.5x`."""
    value: float
    """Computed: a share (0.27) for a percentage, a factor for `x`."""

    @property
    def rounded(self) -> str:
        """The computed figure with as many digits as are printed."""
        unit = self.claim[-1]
        printed = Decimal(self.claim[:-1])
        exact = Decimal(repr(self.value)) * (100 if unit == "%" else 1)
        return f"{exact.quantize(printed, ROUND_HALF_EVEN)}{unit}"

    @property
    def agrees(self) -> bool:
        """Whether it rounds to what is printed."""
        return self.rounded == self.claim


@dataclass(frozen=True)
class Efficiency:
    """What the report compares, of one network at one context length."""

    name: str
    flops: float
    """FP8-equivalent operations of one generated token."""
    cache_bytes: float
    cache_bytes_per_token: float


@cache
def claims() -> dict[str, Any]:
    """`claims.toml`: published figures with their sources."""
    return tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))


def fp8_equivalent(work: Work) -> float:
    """Operations as the report weighs them."""
    return sum(FP8_EQUIVALENT[part.number] * part.flops for part in work if part.part != "mixing")


def efficiency(network: V4 | V32 | GQA8, context: int = REPORT_TOKENS) -> Efficiency:
    """What a network costs at a context length, by the report's way of counting."""
    held = network.cache_bytes(context)
    if isinstance(network, V4):
        held -= network.rows.sequence(network.config, context).pending
    return Efficiency(network.name, fp8_equivalent(network.decode(context)), held, network.cache_per_token())


@cache
def report_networks() -> dict[str, V4 | V32 | GQA8]:
    """V4-Flash, V4-Pro, V3.2, and GQA-8 of either V4's depth."""
    out: dict[str, V4 | V32 | GQA8] = {"v3.2": V32()}
    for preset in ("v4-flash", "v4-pro"):
        network = V4(ModelConfig.preset(preset), preset)
        out |= {preset: network, f"gqa-8 of {preset}": GQA8(network.config, network.stored)}
    return out


def report_figures(context: int = REPORT_TOKENS) -> list[Figure]:
    """Every efficiency figure that the report prints, with ours."""
    found = {name: efficiency(network, context) for name, network in report_networks().items()}
    out = []
    for row in claims()["report"]:
        model = row["model"]
        base = found["v3.2" if row["against"] == "v3.2" else f"gqa-8 of {model}"]
        share = getattr(found[model], row["of"]) / getattr(base, row["of"])
        value = share if row["claim"].endswith("%") else 1 / share
        words = {"flops": "operations a token", "cache_bytes": "cache"}[row["of"]]
        against = {"v3.2": "of V3.2", "gqa-8": "of GQA-8 of its depth"}[row["against"]]
        out.append(Figure(model, f"{words}, {against}", row["claim"], value))
    return out
