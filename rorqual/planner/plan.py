"""A plan: what a network needs at a context length, what fits a machine, how fast and at what price at best.

Every figure is computed for the network and for the two that it is compared with, V3.2 and GQA-8. What the figures
mean and leave out: `bounds.py`.
"""

import math
from dataclasses import dataclass

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.planner.bandwidth import expert_bandwidth
from rorqual.planner.baselines import GQA8, V32
from rorqual.planner.bounds import (
    Bound,
    Resource,
    batch_within,
    chips_needed,
    decode_bound,
    max_batch,
    prefill_bound,
)
from rorqual.planner.cache import CacheRows
from rorqual.planner.hardware import Machine
from rorqual.planner.report import fp8_equivalent
from rorqual.planner.tensors import Inventory, WeightFormat, inventory
from rorqual.planner.work import V4, Network, WeightBytes, Work

RESERVE = 0.1
"""Share of memory for activations, workspaces and fragments, unless another is given."""
STILL_HELPS = 1.05
"""Capacity binds when twice the batch would give this many times the tokens per second, or more."""


@dataclass(frozen=True)
class Workload:
    """What is asked of the machine."""

    context: int
    """Tokens of each sequence."""
    batch: int | None = None
    """Sequences at once; as many as fit (and are fast enough) unless given."""
    tpot_s: float | None = None
    """Longest time between two tokens of a sequence."""
    cache_hit: float = 0.0
    """Share of prompt tokens that are found in a prefix cache."""
    output_share: float = 0.1
    """Generated tokens among all tokens, for the mean price."""

    def __post_init__(self) -> None:
        for name, value in (("cache_hit", self.cache_hit), ("output_share", self.output_share)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, but it is a share; give a number from 0 to 1.")
        is_timed = self.tpot_s is None or 0 < self.tpot_s < math.inf
        if self.context < 1 or (self.batch is not None and self.batch < 1) or not is_timed:
            raise ConfigError(
                f"context is {self.context}, batch {self.batch} and tpot_s {self.tpot_s}, but nothing can be planned "
                "with less than one token, one sequence, no time or endless time. Give positive numbers."
            )


@dataclass(frozen=True)
class Costs:
    """US dollars per million tokens, at the speed of the bounds: no software is cheaper on this machine."""

    miss: float
    """Prompt tokens that are computed."""
    output: float
    """Generated tokens."""
    mean: float
    """All tokens of the workload; prompt tokens found in the prefix cache cost no computing and count 0."""


@dataclass(frozen=True)
class Fit:
    """One network on one machine."""

    chips_needed: int
    """Least chips of this kind for the weights and one sequence."""
    max_batch: int
    """Sequences that find room; 0 where not even one does."""
    batch: int
    """Sequences planned with; 0 when nothing fits or is fast enough."""
    limited_by: Resource | None
    """What more sequences or more speed would need: the binding resource of the step, or `capacity`."""
    decode: Bound | None
    alone: Bound | None
    """Decoding a single sequence."""
    prefill: Bound | None
    costs: Costs | None


@dataclass(frozen=True)
class NetworkPlan:
    """What one network needs, and how it fits."""

    name: str
    weights: WeightBytes
    cache_bytes_per_token: float
    cache_bytes: int
    cache_read: int
    work: Work
    prefill_work: Work
    fit: Fit | None

    @property
    def fp8_equivalent(self) -> float:
        """Operations of one generated token as the V4 report weighs them."""
        return fp8_equivalent(self.work)


@dataclass(frozen=True)
class Plan:
    """The network asked about first, then those that it is compared with."""

    workload: Workload
    machine: Machine | None
    stored: Inventory
    """The tensors of the network asked about, as they are stored."""
    reserve: float
    usd_per_hour: float | None
    """Of one chip."""
    link_bytes_per_s: float | None
    """Each way, that a chip needs so that the exchange of experts hides behind its FP8 arithmetic."""
    networks: tuple[NetworkPlan, ...]


def make_plan(
    config: ModelConfig,
    name: str,
    workload: Workload,
    machine: Machine | None = None,
    *,
    weights: WeightFormat = "official",
    rows: CacheRows | None = None,
    reserve: float = RESERVE,
    usd_per_hour: float | None = None,
) -> Plan:
    """Plan for `config`. `rows`: how the cache is kept, as released unless given; `usd_per_hour`: of a chip, else the
    table's price.

    Raises: ConfigError for more tokens than the network has positions, or figures that cannot be.
    """
    if workload.context > config.max_position_embeddings:
        raise ConfigError(
            f"context is {workload.context:,}, but {name} has {config.max_position_embeddings:,} positions. Give a "
            "shorter context."
        )
    if not 0 <= reserve < 1:
        raise ConfigError(f"reserve is {reserve}, but it is a share of the memory; give a number from 0 to below 1.")
    if usd_per_hour is not None and not 0 <= usd_per_hour < math.inf:
        raise ConfigError(f"usd_per_hour is {usd_per_hour}, but it is the price of a chip; give a number from 0 on.")
    stored = inventory(config, weights)
    ours = V4(config, name, stored, rows)
    networks: tuple[Network, ...] = (ours, V32(), GQA8(config, stored))
    price = usd_per_hour if machine is None or usd_per_hour is not None else machine.chip.usd_per_hour
    needs = None if machine is None else expert_bandwidth(config, peak_flops_per_s=machine.chip.rate("fp8"))
    return Plan(
        workload,
        machine,
        stored,
        reserve,
        price,
        None if needs is None or needs.gb_per_s is None else needs.gb_per_s * 1e9,
        tuple(_plan_one(network, workload, machine, reserve, price) for network in networks),
    )


def _plan_one(
    network: Network, workload: Workload, machine: Machine | None, reserve: float, price: float | None
) -> NetworkPlan:
    context = workload.context
    return NetworkPlan(
        network.name,
        network.weights,
        network.cache_per_token(),
        network.cache_bytes(context),
        network.cache_read(context),
        network.decode(context),
        network.prefill(context),
        None if machine is None else fit(network, workload, machine, reserve, price),
    )


def fit(network: Network, workload: Workload, machine: Machine, reserve: float, usd_per_hour: float | None) -> Fit:
    """How a network fits a machine under a workload; costs only where a price is known."""
    context = workload.context
    needed, most = chips_needed(network, machine, context, reserve), max_batch(network, machine, context, reserve)
    batch = most if workload.batch is None else workload.batch
    if not most:
        return Fit(needed, most, 0, "capacity", None, None, None, None)
    alone, prefill = decode_bound(network, machine, context, 1), prefill_bound(network, machine, context)
    if batch > most:
        return Fit(needed, most, 0, "capacity", None, alone, prefill, None)
    is_slow = False
    if workload.tpot_s is not None:
        quick = batch_within(network, machine, context, workload.tpot_s, batch)
        is_slow, batch = quick < batch, quick
    if not batch:
        return Fit(needed, most, 0, alone.binding, None, alone, prefill, None)
    decode = decode_bound(network, machine, context, batch)
    doubled = decode_bound(network, machine, context, 2 * batch)
    is_full = workload.batch is None and not is_slow
    more_helps = doubled.tokens_per_s >= STILL_HELPS * decode.tokens_per_s
    limited_by: Resource = "capacity" if is_full and more_helps else decode.binding
    costs = None if usd_per_hour is None else _costs(workload, machine, usd_per_hour, decode, prefill)
    return Fit(needed, most, batch, limited_by, decode, alone, prefill, costs)


def _costs(workload: Workload, machine: Machine, usd_per_hour: float, decode: Bound, prefill: Bound) -> Costs:
    usd_per_s = usd_per_hour * machine.count / 3600
    miss, output = (1e6 * usd_per_s / bound.tokens_per_s for bound in (prefill, decode))
    prompt = (1 - workload.cache_hit) * miss
    return Costs(miss, output, (1 - workload.output_share) * prompt + workload.output_share * output)
