"""What tokens cost: prices with their dates, and the exact cost of a request.

Amounts are in picos (`money.py`): a price per million tokens with up to six decimals is then a whole number a token, so
no sum is ever rounded. The table of the hosted API lies beside this file
(`prices.toml`); a user's own has the same form. Source: DeepSeek's price pages of April to September 2026.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rorqual.errors import ConfigError
from rorqual.money import amount_text

_PER_TOKEN = 10**6  # a unit per million tokens is a million picos a token
_KINDS = ("hit", "miss", "output")

Hour = Annotated[int, Field(ge=0, le=24)]
Rate = Annotated[Decimal, Field(ge=0, lt=10**6, decimal_places=6)]
Band = Literal["flat", "off-peak", "peak"]


@dataclass(frozen=True)
class Price:
    """Picos per token of one model at one time. `miss` is the price of prompt tokens that are computed.

    since: when this row of the table came into force. discount: what the rates are already lowered by (0.75: 75 %).
    """

    model: str
    hit: int
    miss: int
    output: int
    currency: str = "USD"
    band: Band = "flat"
    since: datetime | None = None
    discount: Decimal = Decimal(0)

    def worst_case(self, prompt_tokens: int, max_tokens: int) -> int:
        """The most a request can cost, in picos: no hit, and all the output it may have."""
        return prompt_tokens * max(self.hit, self.miss) + max_tokens * self.output

    def to_dict(self) -> dict[str, Any]:
        """The row, in units per million tokens."""
        return {
            "model": self.model,
            **{f"{kind}_per_million": amount_text(getattr(self, kind) * 10**6) for kind in _KINDS},
            "band": self.band,
            "since": None if self.since is None else time_text(self.since),
            "discount": str(self.discount),
        }


@dataclass(frozen=True)
class Tokens:
    """The counts a price applies to. Output includes reasoning."""

    hit: int = 0
    miss: int = 0
    output: int = 0

    @classmethod
    def from_usage(cls, usage: Mapping[str, Any]) -> Tokens:
        """From an API's usage object; hits are `prompt_cache_hit_tokens`, or else `prompt_tokens_details`."""
        prompt = int(usage.get("prompt_tokens") or 0)
        hit = usage.get("prompt_cache_hit_tokens")
        if hit is None:
            hit = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        hit = min(int(hit or 0), prompt)
        return cls(hit, prompt - hit, int(usage.get("completion_tokens") or 0))


@dataclass(frozen=True)
class Cost:
    """What tokens cost at a price, in picos, by kind."""

    tokens: Tokens
    price: Price
    at: datetime

    @property
    def hit(self) -> int:
        return self.tokens.hit * self.price.hit

    @property
    def miss(self) -> int:
        return self.tokens.miss * self.price.miss

    @property
    def output(self) -> int:
        return self.tokens.output * self.price.output

    @property
    def total(self) -> int:
        return self.hit + self.miss + self.output

    @property
    def without_cache(self) -> int:
        """What it would have been had no prompt token come from the cache."""
        return (self.tokens.hit + self.tokens.miss) * self.price.miss + self.output

    @property
    def amount(self) -> Decimal:
        """`total` in units of the currency, exact."""
        return Decimal(amount_text(self.total))

    def to_dict(self) -> dict[str, Any]:
        """Decimal texts, as answers carry them: amounts, and the price with its date."""
        parts = {name: amount_text(getattr(self, name)) for name in ("total", *_KINDS, "without_cache")}
        return {"currency": self.price.currency, **parts, "price": self.price.to_dict(), "at": time_text(self.at)}


class _Rates(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    hit: Rate
    miss: Rate
    output: Rate

    def picos(self, discount: Decimal) -> dict[str, int]:
        return {kind: int(getattr(self, kind) * (1 - discount) * _PER_TOKEN) for kind in _KINDS}


class _Row(_Rates):
    models: Annotated[frozenset[str], Field(min_length=1)]
    since: Annotated[datetime, Field(alias="from")]
    until: datetime | None = None
    currency: str = "USD"
    peak: _Rates | None = None
    discount: Annotated[Decimal, Field(ge=0, le=1, decimal_places=6)] = Decimal(0)

    @model_validator(mode="after")
    def _stays_exact(self) -> _Row:
        for rates in (self, self.peak):
            for kind in _KINDS if rates is not None else ():
                lowered = getattr(rates, kind) * (1 - self.discount) * _PER_TOKEN
                if lowered != int(lowered):
                    raise ValueError(f"{kind} less its discount has more than six decimals")
        return self

    def holds(self, model: str, when: datetime, currency: str | None) -> bool:
        """Whether this is a price of the model at that time."""
        is_in_force = _utc(self.since) <= when and (self.until is None or when < _utc(self.until))
        return model in self.models and is_in_force and currency in (None, self.currency)


class _Peak(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    hours: tuple[tuple[Hour, Hour], ...] = ()
    working_days_from: datetime | None = None
    holidays: frozenset[date] = frozenset()


class PriceTable(BaseModel):
    """Rows of prices and the hours of the peak. `load` reads one; models it does not name have no price."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    price: tuple[_Row, ...] = ()
    peak: _Peak = _Peak()

    @classmethod
    def load(cls, path: Path) -> PriceTable:
        """Raises: ConfigError saying what in the file is wrong."""
        try:  # decimals, for floats would lose what the file says
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal))
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError) as error:
            reason = str(error)
        raise ConfigError(
            f"{path} is no table of prices ({reason}), so no cost follows from it. "
            "Write it like rorqual/planner/prices.toml."
        )

    def is_peak(self, when: datetime) -> bool:
        """Whether peak prices hold at `when`."""
        when = _utc(when)
        days_from = self.peak.working_days_from
        # Peak hours lie on the same date in Beijing, so the date in UTC tells the day there.
        is_free_day = when.weekday() >= 5 or when.date() in self.peak.holidays
        if days_from is not None and when >= _utc(days_from) and is_free_day:
            return False
        return any(start <= when.hour < end for start, end in self.peak.hours)

    def find(self, model: str, when: datetime, currency: str | None = None) -> Price | None:
        """The price of `model` at `when` (UTC where it says no zone); None where the table has none."""
        when = _utc(when)
        rows = [row for row in self.price if row.holds(model, when, currency)]
        if not rows:
            return None
        row = max(rows, key=lambda row: (_utc(row.since), row.currency == "USD"))
        at_peak = row.peak is not None and self.is_peak(when)
        rates = row.peak if at_peak and row.peak is not None else row
        band: Band = "flat" if row.peak is None else "peak" if at_peak else "off-peak"
        return Price(
            model,
            **rates.picos(row.discount),
            currency=row.currency,
            band=band,
            since=_utc(row.since),
            discount=row.discount,
        )

    def models(self) -> list[str]:
        """Every name that has a price at some time."""
        return sorted({model for row in self.price for model in row.models})


@cache
def hosted_prices() -> PriceTable:
    """The table of DeepSeek's hosted API."""
    return PriceTable.load(Path(__file__).with_name("prices.toml"))


def price_at(model: str, when: datetime, *, currency: str = "USD", table: PriceTable | None = None) -> Price:
    """The price of `model` at `when`, of the hosted API unless another table is given.

    Raises: ConfigError when it has no price then, for a model without one is not free.
    """
    table = table or hosted_prices()
    found = table.find(model, when, currency)
    if found is None:
        raise ConfigError(
            f"there is no price in {currency} for {model!r} at {time_text(_utc(when))}. "
            f"Models with prices: {', '.join(table.models())}."
        )
    return found


def cost(
    usage: Mapping[str, Any] | Tokens,
    model: str,
    when: datetime,
    *,
    currency: str = "USD",
    table: PriceTable | None = None,
) -> Cost:
    """What a request of this usage (an API's usage object, or `Tokens`) costs when sent at `when`.

    Raises: ConfigError as `price_at`.
    """
    tokens = usage if isinstance(usage, Tokens) else Tokens.from_usage(usage)
    return Cost(tokens, price_at(model, when, currency=currency, table=table), _utc(when))


def time_text(when: datetime) -> str:
    """`2026-08-16T16:00:00Z`, to the second."""
    return _utc(when).strftime("%Y-%m-%dT%H:%M:%SZ")


def _utc(when: datetime) -> datetime:
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
