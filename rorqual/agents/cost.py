"""What a run costs: tokens as turns use them, and money where the model has a price."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from rorqual.agents.observer import TurnUsage
from rorqual.errors import ConfigError
from rorqual.money import amount_text


@dataclass
class Meter:
    """Adds up turns. model: its name in the hosted price table; None for one that costs nothing."""

    model: str | None = None
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
        if self.model is not None:
            self.picos += self._price(self.model, usage)

    def _price(self, model: str, usage: TurnUsage) -> int:
        from rorqual.planner.prices import Tokens, cost

        tokens = Tokens(usage.cached, max(usage.prompt - usage.cached, 0), usage.completion)
        try:
            found = cost(tokens, model, datetime.now(UTC))
        except ConfigError:  # a model without a price
            return 0
        self.currency = found.price.currency
        return found.total

    def text(self) -> str:
        """For people."""
        cached = f" ({self.cached:,} cached)" if self.cached else ""
        money = "" if self.currency is None else f", {amount_text(self.picos)} {self.currency}"
        return f"{self.prompt:,} tokens read{cached}, {self.completion:,} written{money}"
