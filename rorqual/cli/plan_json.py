"""What `rorqual plan --json` prints."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rorqual.planner.adapters import AdapterPlan
    from rorqual.planner.bounds import Bound
    from rorqual.planner.compare import PriceClaim, SpeedClaim
    from rorqual.planner.hardware import Machine, Table
    from rorqual.planner.plan import Fit, NetworkPlan, Plan
    from rorqual.planner.report import Figure


def hardware(chips: "Table") -> dict[str, Any]:
    """Chips by short name; what a chip has not is left out."""
    return {key: chip.model_dump(exclude_none=True) for key, chip in chips.items()}


def report(figures: "Sequence[Figure]") -> list[dict[str, Any]]:
    """The report's figures, printed and computed."""
    return [asdict(figure) | {"rounded": figure.rounded, "agrees": figure.agrees} for figure in figures]


def speeds(claims: "Sequence[SpeedClaim]") -> list[dict[str, Any]]:
    """Published speeds with their bounds."""
    return [asdict(claim) | {"share": claim.share} for claim in claims]


def plan(found: "Plan", claims: "Sequence[SpeedClaim]", prices: "Sequence[PriceClaim]") -> dict[str, Any]:
    """All of a plan."""
    machine = found.machine
    return {
        "workload": asdict(found.workload),
        "machine": None if machine is None else {"count": machine.count, **machine.chip.model_dump(exclude_none=True)},
        "reserve": found.reserve,
        "usd_per_hour": found.usd_per_hour,
        "expert_link_bytes_per_s": found.link_bytes_per_s,
        "stored": {
            "weights": found.stored.weights,
            "tensors": len(found.stored.tensors),
            "nbytes": found.stored.nbytes,
            "by_component": {name: nbytes for name, (_, nbytes) in found.stored.by_component.items()},
            "by_dtype": {name: nbytes for name, (_, nbytes) in found.stored.by_dtype.items()},
        },
        "networks": [_network(network) for network in found.networks],
        "speed_claims": speeds(claims),
        "price_claims": [asdict(price) for price in prices],
    }


def adapter(found: "AdapterPlan", tokens: int, machine: "Machine | None", reserve: float) -> dict[str, Any]:
    """All of an adapter's plan; `fits` is null without a machine."""
    return {
        **asdict(found),
        "total": found.total,
        "saved": found.saved,
        "tokens": tokens,
        "fits": None if machine is None else found.fits(machine.count * machine.chip.memory, reserve),
    }


def _network(network: "NetworkPlan") -> dict[str, Any]:
    return {
        "name": network.name,
        "weight_bytes": asdict(network.weights) | {"total": network.weights.total},
        "cache_bytes_per_token": network.cache_bytes_per_token,
        "cache_bytes": network.cache_bytes,
        "cache_read_per_token": network.cache_read,
        "flops_per_token": [asdict(part) for part in network.work],
        "fp8_equivalent_flops_per_token": network.fp8_equivalent,
        "prefill_flops_per_token": [asdict(part) for part in network.prefill_work],
        "fit": None if network.fit is None else _fit(network.fit),
    }


def _fit(fit: "Fit") -> dict[str, Any]:
    return {
        "chips_needed": fit.chips_needed,
        "max_batch": fit.max_batch,
        "batch": fit.batch,
        "limited_by": fit.limited_by,
        "decode": _bound(fit.decode),
        "alone": _bound(fit.alone),
        "prefill": _bound(fit.prefill),
        "usd_per_million": None if fit.costs is None else asdict(fit.costs),
    }


def _bound(bound: "Bound | None") -> dict[str, Any] | None:
    if bound is None:
        return None
    return {
        "tokens_per_s": bound.tokens_per_s,
        "seconds": bound.seconds,
        "binding": bound.binding,
        "seconds_by_resource": bound.seconds_by_resource,
    }
