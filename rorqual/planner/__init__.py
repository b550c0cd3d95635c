"""Arithmetic about models: what a configuration holds and needs, without running it.

Each name is imported at first use: prices need no model, and so no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Bandwidth": "rorqual.planner.bandwidth",
    "CacheBytes": "rorqual.planner.cache",
    "CacheRows": "rorqual.planner.cache",
    "Efficiency": "rorqual.planner.report",
    "Figure": "rorqual.planner.report",
    "ForwardFlops": "rorqual.planner.flops",
    "GQA8": "rorqual.planner.baselines",
    "Inventory": "rorqual.planner.tensors",
    "Network": "rorqual.planner.work",
    "ParameterCount": "rorqual.planner.parameters",
    "TensorEntry": "rorqual.planner.tensors",
    "V32": "rorqual.planner.baselines",
    "V4": "rorqual.planner.work",
    "Work": "rorqual.planner.work",
    "build_on_meta": "rorqual.planner.parameters",
    "bytes_by_component": "rorqual.planner.stored",
    "count_model": "rorqual.planner.parameters",
    "count_parameters": "rorqual.planner.parameters",
    "efficiency": "rorqual.planner.report",
    "expert_bandwidth": "rorqual.planner.bandwidth",
    "forward_flops": "rorqual.planner.flops",
    "inventory": "rorqual.planner.tensors",
    "official_inventory": "rorqual.planner.tensors",
    "own_rows": "rorqual.planner.cache",
    "paged_bytes": "rorqual.planner.cache",
    "released_rows": "rorqual.planner.cache",
    "report_figures": "rorqual.planner.report",
}

__all__ = [
    "Bandwidth",
    "CacheBytes",
    "CacheRows",
    "Efficiency",
    "Figure",
    "ForwardFlops",
    "GQA8",
    "Inventory",
    "Network",
    "ParameterCount",
    "TensorEntry",
    "V32",
    "V4",
    "Work",
    "build_on_meta",
    "bytes_by_component",
    "count_model",
    "count_parameters",
    "efficiency",
    "expert_bandwidth",
    "forward_flops",
    "inventory",
    "official_inventory",
    "own_rows",
    "paged_bytes",
    "released_rows",
    "report_figures",
]

if TYPE_CHECKING:
    from rorqual.planner.bandwidth import Bandwidth as Bandwidth
    from rorqual.planner.bandwidth import expert_bandwidth as expert_bandwidth
    from rorqual.planner.baselines import GQA8 as GQA8
    from rorqual.planner.baselines import V32 as V32
    from rorqual.planner.cache import CacheBytes as CacheBytes
    from rorqual.planner.cache import CacheRows as CacheRows
    from rorqual.planner.cache import own_rows as own_rows
    from rorqual.planner.cache import paged_bytes as paged_bytes
    from rorqual.planner.cache import released_rows as released_rows
    from rorqual.planner.flops import ForwardFlops as ForwardFlops
    from rorqual.planner.flops import forward_flops as forward_flops
    from rorqual.planner.parameters import ParameterCount as ParameterCount
    from rorqual.planner.parameters import build_on_meta as build_on_meta
    from rorqual.planner.parameters import count_model as count_model
    from rorqual.planner.parameters import count_parameters as count_parameters
    from rorqual.planner.report import Efficiency as Efficiency
    from rorqual.planner.report import Figure as Figure
    from rorqual.planner.report import efficiency as efficiency
    from rorqual.planner.report import report_figures as report_figures
    from rorqual.planner.stored import bytes_by_component as bytes_by_component
    from rorqual.planner.tensors import Inventory as Inventory
    from rorqual.planner.tensors import TensorEntry as TensorEntry
    from rorqual.planner.tensors import inventory as inventory
    from rorqual.planner.tensors import official_inventory as official_inventory
    from rorqual.planner.work import V4 as V4
    from rorqual.planner.work import Network as Network
    from rorqual.planner.work import Work as Work


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rorqual.planner' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
