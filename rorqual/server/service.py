"""What every route of the server shares: the models, and how the server behaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rorqual.errors import ConfigError
from rorqual.referee import Continuity
from rorqual.server import aliases
from rorqual.server.accounts import Accounts
from rorqual.server.engine_view import Recent
from rorqual.server.refusals import unknown_model
from rorqual.server.served import ServedModel


@dataclass(frozen=True)
class Behaviour:
    """Where this server can differ from the hosted one; the defaults are what most clients need.

    aliases: further names of models, by the name clients send.
    keep_reasoning: put reasoning back that a client dropped (`referee/continuity.py`); False answers a tool turn
        without it as the hosted API does, with a 400.
    documented_reasoning_check: without `keep_reasoning`, refuse as the documentation says (any assistant message
        without reasoning in a request with tools), not only where the hosted API was seen to.
    forced_calls_while_thinking: let `tool_choice` force a call in thinking mode too, which the hosted API refuses.
    engine_view: show what the engine does at `/engine/view`, and to who has an answer's id what was picked for it.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    keep_reasoning: bool = True
    documented_reasoning_check: bool = False
    forced_calls_while_thinking: bool = False
    engine_view: bool = True


@dataclass(frozen=True)
class Service:
    """One object that routes and dialects are handed.

    models: by the names they are served under; the first one is what the page offers first.
    keep_alive_s: a waiting stream gets a comment line this often.
    continuity: the reasoning of answers given and their calls as sampled, None where they are not kept.
    accounts: who may ask for how much, and what it costs.
    recent: the last answers, for the engine view; None where it is switched off.
    """

    models: Mapping[str, ServedModel]
    behaviour: Behaviour = field(default_factory=Behaviour)
    keep_alive_s: float = 10.0
    continuity: Continuity | None = None
    accounts: Accounts = field(default_factory=Accounts)
    recent: Recent | None = None

    def find(self, name: str, status: int = 400, *, claude: bool = False) -> ServedModel:
        """The model that `name` stands for; `claude`: Anthropic's names too. Raises: RequestError naming those there
        are.
        """
        served = aliases.resolve(name, self.models, dict(self.behaviour.aliases), claude=claude)
        if served is None:
            raise unknown_model(self.models, name, status)
        return self.models[served]


def make_service(
    models: Sequence[ServedModel],
    behaviour: Behaviour | None = None,
    keep_alive_s: float = 10.0,
    accounts: Accounts | None = None,
) -> Service:
    """Raises: ConfigError when two models share a name, or an alias names none of them."""
    named = {model.name: model for model in models}
    if len(named) < len(models):
        raise ConfigError(
            f"the models are named {', '.join(model.name for model in models)}, so a request could not tell "
            "them apart. Give each its own name."
        )
    behaviour = behaviour or Behaviour()
    for alias, name in behaviour.aliases.items():
        if name not in named:
            raise ConfigError(
                f"the alias {alias!r} stands for {name!r}, but no such model is served. Use one of {', '.join(named)}."
            )
    continuity = Continuity() if behaviour.keep_reasoning else None
    recent = Recent() if behaviour.engine_view else None
    return Service(named, behaviour, keep_alive_s, continuity, accounts or Accounts(), recent)
