"""Published speeds and prices beside what a plan computes for the same model, hardware and context.

The claims stand in `claims.toml` with their sources. A bound above a speed claim says that the claim can be; how far it
lies above says how much of the machine's peak the claimed speed uses.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rorqual.config import ModelConfig
from rorqual.planner.bounds import Resource
from rorqual.planner.hardware import find_machine
from rorqual.planner.plan import RESERVE, Costs, Workload, fit
from rorqual.planner.prices import price_at
from rorqual.planner.report import claims
from rorqual.planner.tensors import inventory
from rorqual.planner.work import V4

_PICOS = 1e6
"""Picos a token in a dollar per million tokens."""


@dataclass(frozen=True)
class SpeedClaim:
    """A published speed and the bound for it, both in tokens per second of a card or of one sequence."""

    model: str
    hardware: str
    context: int
    tpot_ms: float | None
    per: str
    claimed: float
    bound: float
    binding: Resource
    source: str
    assumed: str

    @property
    def share(self) -> float:
        """The claim as a share of the bound."""
        return self.claimed / self.bound


@dataclass(frozen=True)
class PriceClaim:
    """A published ratio of prices, that of the list prices, and that of a plan's least costs where they are known."""

    model: str
    claim: str
    against: str
    basis: str
    by_list: float
    """How many times the list price of the other model is above the hosted API's."""
    by_plan: float | None
    """How many times it is above the least cost that the plan computes."""
    source: str


def speed_claims(models: Collection[str]) -> list[SpeedClaim]:
    """Every published speed of these presets with its bound."""
    rows = [row for row in claims()["speed"] if row["model"] in models]
    networks: dict[str, V4] = {}
    for name in sorted({row["model"] for row in rows}):
        config = ModelConfig.preset(name)
        networks[name] = V4(config, name, inventory(config, "official"))
    return [_speed(row, networks[row["model"]]) for row in rows]


def _speed(row: dict[str, Any], network: V4) -> SpeedClaim:
    machine, tpot_ms = find_machine(row["hardware"]), row.get("tpot_ms")
    work = Workload(row["context"], tpot_s=None if tpot_ms is None else tpot_ms / 1e3)
    found = fit(network, work, machine, RESERVE, None)
    step = found.decode if row["per"] == "card" else found.alone
    assert step is not None, f"the claim for {row['hardware']} is about a machine that cannot hold the model"
    chips = machine.count if row["per"] == "card" else 1
    return SpeedClaim(
        row["model"], row["hardware"], row["context"], tpot_ms, row["per"], row["tokens_per_s"],
        step.tokens_per_s / chips, step.binding, row["source"], row.get("assumed", ""),
    )  # fmt: skip


def price_claims(model: str, costs: Costs | None) -> list[PriceClaim]:
    """Every published ratio of prices of this preset, with the plan's where it has costs."""
    out = []
    for row in claims()["price"]:
        if row["model"] != model:
            continue
        hosted = price_at(row["hosted"], row["date"])
        both = row["basis"] == "input and output"
        theirs = row["output"] + (row["input"] if both else 0)
        listed = (hosted.output + (hosted.miss if both else 0)) / _PICOS
        least = None if costs is None else costs.output + (costs.miss if both else 0)
        by_plan = None if least is None else theirs / least
        out.append(
            PriceClaim(model, row["claim"], row["against"], row["basis"], theirs / listed, by_plan, row["source"])
        )
    return out
