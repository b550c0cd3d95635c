"""What answers cost: tokens and money a solved item, waste, overthinking, adherence to a budget.

Source: evaluation specification, section 3.5. All tokens count: reasoning, answer, retries and the referee's. `None`
where a value is not defined, as everywhere in these metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import correlation, median
from typing import Protocol

from rorqual.errors import ConfigError
from rorqual.evals.metrics import share
from rorqual.evals.records import Usage

MILLION = 1_000_000


class Spent(Protocol):
    """An answered item: what it used, and its score from 0 to 1."""

    @property
    def usage(self) -> Usage: ...
    @property
    def score(self) -> float: ...


@dataclass(frozen=True)
class PriceVector:
    """Units of money a million tokens: prompt tokens from the cache, computed ones, and output."""

    hit: float = 0.0
    miss: float = 0.0
    output: float = 0.0
    currency: str = "USD"

    @staticmethod
    def parse(text: str) -> PriceVector:
        """From `HIT,MISS,OUTPUT[,CURRENCY]`. Raises: ConfigError for what is none."""
        parts = [part.strip() for part in text.split(",")]
        try:
            hit, miss, output = (float(part) for part in parts[:3])
            if len(parts) <= 4 and min(hit, miss, output) >= 0:
                return PriceVector(hit, miss, output, *(part.upper() for part in parts[3:]))
        except ValueError:
            pass
        raise ConfigError(
            f"--price {text!r} is no price vector. Give three prices a million tokens, of cached, computed and output "
            "tokens, and a currency if it is not USD: --price 0.028,0.14,0.28"
        )

    def cost(self, usage: Usage) -> float:
        """Units of money of one item; the referee's tokens are taken as computed ones and output."""
        computed = usage.prompt - usage.cached + usage.referee_prompt
        output = usage.completion + usage.referee_completion
        return (usage.cached * self.hit + computed * self.miss + output * self.output) / MILLION


def output_tokens(usage: Usage) -> int:
    """What the model wrote for an item: reasoning and answer, and what the referee had written."""
    return usage.completion + usage.referee_completion


def tokens_per_solved(records: Sequence[Spent]) -> float | None:
    """TPS: output tokens of all items, over the items solved."""
    return share(sum(output_tokens(r.usage) for r in records), _solved(records))


def cost_per_solved(records: Sequence[Spent], price: PriceVector) -> float | None:
    """CPS: cost of all items, over the items solved."""
    return share(sum(price.cost(r.usage) for r in records), _solved(records))


def waste(records: Sequence[Spent]) -> float | None:
    """WASTE: of all output tokens, the share spent on items that were not solved."""
    lost = sum(output_tokens(r.usage) for r in records if r.score < 1)
    return share(lost, sum(output_tokens(r.usage) for r in records))


def verification_ratio(records: Sequence[Spent]) -> float | None:
    """VER: the referee's tokens over the generation's."""
    return share(sum(r.usage.referee_completion for r in records), sum(r.usage.completion for r in records))


def overthinking(pairs: Iterable[tuple[float, float]]) -> float | None:
    """OVT: median over solved items of tokens used over the least that a right answer needs, given as pairs."""
    ratios = [used / least for used, least in pairs if least > 0]
    return median(ratios) if ratios else None


def adherence(used: Sequence[float], asked: Sequence[float], tolerance: float = 0.1) -> float | None:
    """ADH: the share of runs whose length is within `tolerance` of the budget that was asked for."""
    near = sum(abs(u - a) <= tolerance * a for u, a in zip(used, asked, strict=True))
    return share(near, len(used))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side does not vary."""
    a, b = (_ranks(values) for values in (first, second))
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1, equal ones at the mean of theirs."""
    places: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(rank)
    return [sum(places[value]) / len(places[value]) for value in values]


def _solved(records: Sequence[Spent]) -> int:
    return sum(r.score >= 1 for r in records)
