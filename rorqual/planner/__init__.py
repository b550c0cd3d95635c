"""Arithmetic about models: what a configuration holds and needs, without running it."""

from rorqual.planner.parameters import ParameterCount, build_on_meta, count_model, count_parameters

__all__ = ["ParameterCount", "build_on_meta", "count_model", "count_parameters"]
