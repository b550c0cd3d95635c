"""Suites by the names that `rorqual eval` takes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.evals.suites.base import Setting, Suite

_CLASSES = {
    "facts": "facts.FactsSuite",
    "needle": "needle.NeedleSuite",
    "hop": "hop.HopSuite",
    "mrcr": "mrcr.MrcrSuite",
    "aggregation": "aggregation.AggregationSuite",
    "arith": "arith.ArithSuite",
    "effort": "effort.EffortSuite",
    "tools": "tools.ToolsSuite",
    "json": "structured.JsonSuite",
    "claims": "claims.ClaimsSuite",
    "threads": "threads.ThreadsSuite",
    "done": "done.DoneSuite",
    "code": "code.CodeSuite",
}
NAMES = tuple(_CLASSES)
_FROM_FILE = {"facts": "public.PublicFactsSuite", "mrcr": "public.PublicMrcrSuite"}


def check_name(name: str) -> None:
    """Raises: ConfigError for a name that is no suite."""
    if name not in _CLASSES:
        raise ConfigError(f"there is no suite {name!r}, so nothing can be measured. Suites: {', '.join(NAMES)}.")


def build(name: str, setting: Setting) -> Suite:
    """The suite called `name`. Raises: ConfigError for a name that is none, or a set it cannot read."""
    check_name(name)
    if "set" in setting.options and name not in _FROM_FILE:
        raise ConfigError(
            f"--set is for the suites {' and '.join(_FROM_FILE)}; {name} makes its own items. Leave it out."
        )
    if "announce" in setting.options and (name != "facts" or "set" in setting.options):
        raise ConfigError(
            f"--announce is for the suite facts on its own items; {name} has no announced thresholds. Leave it out."
        )
    module, _, kind = (_FROM_FILE if "set" in setting.options else _CLASSES)[name].partition(".")
    found: type[Suite] = getattr(importlib.import_module(f"rorqual.evals.suites.{module}"), kind)
    return found(setting)
