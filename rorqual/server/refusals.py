"""Refusals that several parts of the server make in the same words."""

from __future__ import annotations

from collections.abc import Iterable

from rorqual.errors import RequestError


def unknown_field(path: str) -> RequestError:
    """The refusal of a field this server does not act on."""
    return RequestError(
        f"Unknown field `{path}`: this server refuses what it would not act on. Remove it from the request.",
        param=path,
        code="unknown_field",
    )


def unknown_model(names: Iterable[str], asked: str, status: int = 400) -> RequestError:
    """The refusal of a name that no model has; it names those there are."""
    known = list(names)
    if len(known) == 1:
        text = f"The supported API model name is {known[0]}"
    elif len(known) == 2:
        text = f"The supported API model names are {known[0]} or {known[1]}"
    else:
        text = f"The supported API model names are {', '.join(known[:-1])}, and {known[-1]}"
    return RequestError(f"{text}, but you passed {asked}.", status=status, param="model", code="model_not_found")
