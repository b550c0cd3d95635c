"""Figures of a step beyond its loss: what `metrics.jsonl` says about the head, routers, mixes, norms and updates.

Most come with the micro-batches (`LossParts.figures`); here they become a record. The heavy ones are taken from one
micro-batch of a step that is logged. Source: V4 report (clamp); mHC paper (amplification); V4 training practice.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rorqual.parallel.mesh import Mesh, sum_over
from rorqual.train.losses import Figure, LossParts

FAMILIES = ("embedding", "head", "attention", "indexer", "router", "experts", "mix", "norms", "engram", "mtp", "other")
"""Groups of parameters by which norms are reported; everything of an MTP module counts as mtp."""


def merged(parts: Sequence[LossParts]) -> dict[str, Figure]:
    """The figures of all micro-batches together."""
    total: dict[str, Figure] = {}
    for part in parts:
        for name, (added, count, largest) in part.figures.items():
            before = total.get(name, (0.0, 0.0, -math.inf))
            total[name] = (before[0] + added, before[1] + count, max(before[2], largest))
    return total


def head_record(figures: dict[str, Figure]) -> dict[str, Any]:
    """`z` and `z_max`: mean and largest log-normaliser of the output head's softmax over the step's targets."""
    z = figures.get("z", (0.0, 0.0, -math.inf))
    return {"z": _mean(z), "z_max": z[2] if math.isfinite(z[2]) else None}


def health_record(figures: dict[str, Figure]) -> dict[str, Any]:
    """The figures of `model/health.py` by name, those of layers as a table; empty when none was taken."""
    record: dict[str, Any] = {}
    clamp = [figure for name, figure in figures.items() if name.startswith("clamp/")]
    for name, figure in figures.items():
        kind, slash, where = name.partition("/")
        if not slash:
            if kind != "z":
                record[kind] = _short(figure[2])
            continue
        value = figure[2] if kind in ("mix_column_error", "router_logit") else _mean(figure)
        record.setdefault(kind, {})[where] = _short(value)
    if clamp:
        record["clamp_rate"] = sum(figure[0] for figure in clamp) / sum(figure[1] for figure in clamp)
    return record


def family_of(name: str) -> str:
    """The family of a parameter by its name."""
    if name.startswith("mtp."):
        return "mtp"
    if ".indexer." in name:
        return "indexer"
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf.endswith("norm"):
        return "norms"
    for part, family in (
        (".engram.", "engram"),
        (".attn.", "attention"),
        (".gate.", "router"),
        (".ffn.", "experts"),
        ("hc_", "mix"),
        ("embed", "embedding"),
        ("head", "head"),
    ):
        if part in name:
            return family
    return "other"


@torch.no_grad()
def norms_by_family(tensors: Iterable[tuple[str, Tensor]], mesh: Mesh) -> dict[str, float]:
    """Norms of named tensors by family, every rank giving the elements that only it gives."""
    named = [(family_of(name), tensor) for name, tensor in tensors if tensor.numel()]
    squares = dict.fromkeys(FAMILIES, 0.0)
    if named:
        norms = torch.stack([n.float() for n in torch._foreach_norm([tensor for _, tensor in named])]).tolist()
        for (family, _), norm in zip(named, norms, strict=True):
            squares[family] += norm * norm
    totals = sum_over(mesh.world_group, list(squares.values())).tolist()
    return {family: _short(math.sqrt(total)) for family, total in zip(FAMILIES, totals, strict=True) if total > 0}


def _mean(figure: Figure) -> float | None:
    return figure[0] / figure[1] if figure[1] else None


def _short(value: float | None) -> Any:
    """Six digits are enough for a plot."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
