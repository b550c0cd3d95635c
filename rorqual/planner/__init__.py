"""Arithmetic about models: what a configuration holds and needs, without running it."""

from rorqual.planner.bandwidth import Bandwidth, expert_bandwidth
from rorqual.planner.cache import CacheBytes, CacheRows, own_rows, paged_bytes, released_rows
from rorqual.planner.flops import ForwardFlops, forward_flops
from rorqual.planner.inventory import Inventory, TensorEntry, inventory, official_inventory
from rorqual.planner.parameters import ParameterCount, build_on_meta, count_model, count_parameters

__all__ = [
    "Bandwidth",
    "CacheBytes",
    "CacheRows",
    "ForwardFlops",
    "Inventory",
    "ParameterCount",
    "TensorEntry",
    "build_on_meta",
    "count_model",
    "count_parameters",
    "expert_bandwidth",
    "forward_flops",
    "inventory",
    "official_inventory",
    "own_rows",
    "paged_bytes",
    "released_rows",
]
