"""Which implementation of an operation runs.

Every operation has a plain `reference`; faster twins (`native`: C built by the system compiler) register beside it and
say for which tensors they work. `RORQUAL_OPS=reference` switches all twins off.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_implementations: dict[str, list[tuple[str, Callable[..., Any], Callable[[Tensor], bool]]]] = {}
_only = os.environ.get("RORQUAL_OPS", "")


def register(
    operation: str, name: str, function: Callable[..., Any], works: Callable[[Tensor], bool] = lambda _: True
) -> None:
    """Offer `function` as implementation `name` of `operation` for tensors where `works` is true; the newest wins."""
    _implementations.setdefault(operation, []).insert(0, (name, function, works))


def pick(operation: str, tensor: Tensor) -> Callable[..., Any]:
    """The implementation to use for inputs like `tensor`."""
    for name, function, works in _implementations[operation]:
        if (name == "reference" or allows(name)) and works(tensor):
            return function
    raise KeyError(operation)  # our own mistake: every operation registers a reference that always works


def chosen(operation: str, tensor: Tensor) -> str:
    """The name of the implementation that `pick` gives."""
    for name, _, works in _implementations[operation]:
        if (name == "reference" or allows(name)) and works(tensor):
            return name
    raise KeyError(operation)


@contextmanager
def only(name: str) -> Iterator[None]:
    """Let only family `name` (and references) run meanwhile, in all threads: for controls that must be without it."""
    global _only
    before, _only = _only, name
    try:
        yield
    finally:
        _only = before


def implementations(operation: str) -> dict[str, Callable[..., Any]]:
    """All registered implementations by name; tests hold each of them to the reference."""
    return {name: function for name, function, _ in _implementations[operation]}


def allows(name: str) -> bool:
    """Whether implementations of family `name` may run."""
    return not _only or _only == name


def operations() -> list[str]:
    """Names of all registered operations."""
    return list(_implementations)
