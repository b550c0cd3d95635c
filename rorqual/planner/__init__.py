"""Arithmetic about models: what a configuration holds and needs, without running it."""

from rorqual.planner.bandwidth import Bandwidth, expert_bandwidth
from rorqual.planner.baselines import GQA8, V32
from rorqual.planner.cache import CacheBytes, CacheRows, own_rows, paged_bytes, released_rows
from rorqual.planner.flops import ForwardFlops, forward_flops
from rorqual.planner.inventory import Inventory, TensorEntry, inventory, official_inventory
from rorqual.planner.parameters import ParameterCount, build_on_meta, count_model, count_parameters
from rorqual.planner.report import Efficiency, Figure, efficiency, report_figures
from rorqual.planner.stored import bytes_by_component
from rorqual.planner.work import V4, Network, Work

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
