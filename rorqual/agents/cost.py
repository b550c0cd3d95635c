"""What a run costs: tokens as turns use them, and money where the model has a price."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from rorqual.agents.observer import TurnUsage
from rorqual.errors import ConfigError
from rorqual.money import amount_text


@dataclass
class Meter:
    """Adds up turns. model: a name of the hosted price table; others cost nothing that is known here."""

    model: str
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    picos: int = 0
    currency: str | None = None

    def add(self, usage: TurnUsage) -> None:
        """Count a turn, at the price of this moment."""
        self.prompt += usage.prompt
        self.cached += usage.cached
        self.completion += usage.completion
        cost = self._price(usage)
        self.picos += cost

    def _price(self, usage: TurnUsage) -> int:
        from rorqual.planner.prices import Tokens, cost

        tokens = Tokens(usage.cached, max(usage.prompt - usage.cached, 0), usage.completion)
        try:
            found = cost(tokens, self.model, datetime.now(UTC))
        except ConfigError:  # a model without a price, such as one that runs here
            return 0
        self.currency = found.price.currency
        return found.total

    def text(self) -> str:
        """For people."""
        cached = f" ({self.cached:,} cached)" if self.cached else ""
        money = "" if self.currency is None else f", {amount_text(self.picos)} {self.currency}"
        return f"{self.prompt:,} tokens read{cached}, {self.completion:,} written{money}"
