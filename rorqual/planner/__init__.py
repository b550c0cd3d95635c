"""Arithmetic about models: what a configuration holds and needs, without running it."""

from rorqual.planner.bandwidth import Bandwidth, expert_bandwidth
from rorqual.planner.flops import ForwardFlops, forward_flops
from rorqual.planner.parameters import ParameterCount, build_on_meta, count_model, count_parameters
from rorqual.planner.stored import bytes_by_component

__all__ = [
    "Bandwidth",
    "ForwardFlops",
    "ParameterCount",
    "build_on_meta",
    "bytes_by_component",
    "count_model",
    "count_parameters",
    "expert_bandwidth",
    "forward_flops",
]
