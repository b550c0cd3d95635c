"""What every route of the server shares: the models, and how the server behaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rorqual.errors import ConfigError
from rorqual.server.served import ServedModel, find_model


@dataclass(frozen=True)
class Service:
    """One object that routes and dialects are handed.

    models: by the names they are served under; the first one is what the page offers first.
    keep_alive_s: a waiting stream gets a comment line this often.
    """

    models: Mapping[str, ServedModel]
    keep_alive_s: float = 10.0

    def find(self, name: str, status: int = 400) -> ServedModel:
        """The model that `name` stands for. Raises: RequestError naming those there are."""
        return find_model(self.models, name, status)


def by_name(models: Sequence[ServedModel]) -> dict[str, ServedModel]:
    """Raises: ConfigError when two models share a name."""
    named = {model.name: model for model in models}
    if len(named) < len(models):
        raise ConfigError(
            f"the models are named {', '.join(model.name for model in models)}, so a request could not tell "
            "them apart. Give each its own name."
        )
    return named
