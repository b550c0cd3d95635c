"""Prices: every period, peak hours, exact sums, and the user's own table."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import ConfigError
from rorqual.money import amount_text, parse_amount
from rorqual.planner.prices import (
    PriceTable,
    Tokens,
    cost,
    hosted_prices,
    price_at,
)

FLASH, PRO = "deepseek-v4-flash", "deepseek-v4-pro"
MILLION = 10**6


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("model", "when", "rates"),
    [
        (FLASH, "2026-04-24 00:00", "0.028 0.14 0.28"),
        (FLASH, "2026-04-26 12:14:59", "0.028 0.14 0.28"),
        (FLASH, "2026-04-26 12:15", "0.0028 0.14 0.28"),
        ("deepseek-reasoner", "2026-07-24 15:58", "0.0028 0.14 0.28"),
        (PRO, "2026-04-25 09:00", "0.145 1.74 3.48"),
        (PRO, "2026-06-30 09:00", "0.003625 0.435 0.87"),  # the discount went on after its announced end
        (FLASH, "2026-08-16 15:59:59", "0.0028 0.14 0.28"),
        (FLASH, "2026-08-16 16:00", "0.007 0.22 0.66"),
        (PRO, "2026-08-16 16:00", "0.022 0.66 1.98"),
        (PRO, "2026-08-17 01:00", "0.044 1.32 3.96"),
        (FLASH, "2026-08-17 03:59:59", "0.014 0.44 1.32"),
        (FLASH, "2026-08-17 04:00", "0.007 0.22 0.66"),
        (FLASH, "2026-08-17 06:00", "0.014 0.44 1.32"),
        (FLASH, "2026-08-17 10:00", "0.007 0.22 0.66"),
        (FLASH, "2026-08-22 08:00", "0.014 0.44 1.32"),  # a Saturday in August is a day like others
        (FLASH, "2026-09-05 08:00", "0.007 0.22 0.66"),  # one in September is not
        ("deepseek-flash", "2026-09-10 04:00", "0.003 0.15 0.6"),
        (FLASH, "2026-09-10 06:00", "0.006 0.3 1.2"),
        ("deepseek-flash", "2026-10-01 08:00", "0.003 0.15 0.6"),  # a holiday
        (PRO, "2026-09-14 08:00", "0.044 1.32 3.96"),
    ],
)
def test_every_period(model: str, when: str, rates: str) -> None:
    price = price_at(model, at(when))
    assert [price.hit, price.miss, price.output] == [Decimal(rate) * MILLION for rate in rates.split()]


def test_the_yuan_prices_of_the_launch() -> None:
    price = price_at(PRO, at("2026-04-25 00:00"), currency="CNY")
    assert (price.hit, price.miss, price.output, price.currency) == (1 * MILLION, 12 * MILLION, 24 * MILLION, "CNY")
    assert price_at(PRO, at("2026-04-25 00:00")).currency == "USD"


@pytest.mark.parametrize(
    ("model", "when"),
    [(FLASH, "2026-04-23 23:59"), ("deepseek-chat", "2026-07-24 15:59"), ("minke", "2026-09-01 00:00")],
)
def test_no_price_is_not_a_price_of_nothing(model: str, when: str) -> None:
    with pytest.raises(ConfigError, match=f"no price in USD for '{model}'.*deepseek-v4-pro"):
        price_at(model, at(when))
    assert hosted_prices().find(model, at(when)) is None


def test_times_are_compared_in_utc() -> None:
    beijing = datetime.fromisoformat("2026-08-17T00:00:00+08:00")
    assert price_at(FLASH, beijing) == price_at(FLASH, at("2026-08-16 16:00"))
    assert price_at(FLASH, beijing - timedelta(seconds=1)).miss == 140_000


counts = st.integers(0, 2**40)


@given(counts, counts, counts)
def test_sums_are_exact(hit: int, miss: int, output: int) -> None:
    usage = {"prompt_tokens": hit + miss, "prompt_cache_hit_tokens": hit, "completion_tokens": output}
    found = cost(usage, PRO, at("2026-06-01 00:00"))
    exact = Decimal(hit) * 3625 + Decimal(miss) * 435_000 + Decimal(output) * 870_000
    assert found.total == exact and found.amount * 10**12 == exact
    body = found.to_dict()
    assert sum(parse_amount(body[part]) for part in ("hit", "miss", "output")) == parse_amount(body["total"]) == exact
    assert parse_amount(body["without_cache"]) == (hit + miss) * 435_000 + output * 870_000
    assert found.total <= found.without_cache <= found.price.worst_case(hit + miss, output)
    assert body["price"]["since"] == "2026-04-26T12:15:00Z" and body["price"]["discount"] == "0.75"


@given(st.integers(-(10**18), 10**18))
def test_amounts_survive_their_text(picos: int) -> None:
    assert parse_amount(amount_text(picos)) == picos
    assert "e" not in amount_text(picos).lower()


def test_how_amounts_read() -> None:
    assert [amount_text(n) for n in (0, 5 * 10**12, 3625, -(10**11))] == ["0.00", "5.00", "0.000000003625", "-0.10"]
    for text in ("", "five", "NaN", "inf", "0.0000000000001"):
        with pytest.raises(ConfigError, match="no amount of money"):
            parse_amount(text)


def test_usage_objects_of_other_shapes() -> None:
    details = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens": 2}
    assert Tokens.from_usage(details) == Tokens(4, 5, 2)
    assert Tokens.from_usage({"prompt_tokens": 9, "prompt_tokens_details": None}) == Tokens(0, 9, 0)


OWN = """
[[price]]
models = ["minke"]
from = 2026-01-01T00:00:00Z
hit = 0.1
miss = 1
output = 2.5
"""


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(OWN)
    table = PriceTable.load(path)
    assert cost(Tokens(10, 20, 30), "minke", at("2026-05-01 00:00"), table=table).total == 96 * MILLION
    assert table.find(FLASH, at("2026-05-01 00:00")) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("hit = 0.1", "hit = 0.0000001", "hit.*decimal"),
        ("hit = 0.1", "hit = -1", "hit"),
        ("hit = 0.1\n", "", "hit.*required"),
        ('["minke"]', "[]", "models"),
        ("output = 2.5", "output = 2.5\ndiscount = 0.3333333", "discount"),
        ("output = 2.5", "output = 0.000001\ndiscount = 0.5", "more than six decimals"),
        ("output = 2.5", "output = 2.5\nsurcharge = 1", "surcharge"),
        ("[[price]]", "[[price]", "line 2"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match=f"no table of prices.*{says}"):
        PriceTable.load(path)
