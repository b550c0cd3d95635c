"""Amounts of money as whole numbers of 1e-12 of a currency unit ("picos"), and their texts. Nothing is rounded."""

from decimal import Decimal, InvalidOperation
from typing import Final

from rorqual.errors import ConfigError

PICOS: Final = 10**12  # in one unit


def amount_text(picos: int) -> str:
    """Exact decimal text without needless zeros, two decimals at least: `0.00`, `12.50`, `0.000000003625`."""
    whole, rest = divmod(abs(picos), PICOS)
    decimals = f"{rest:012d}".rstrip("0").ljust(2, "0")
    return f"{'-' if picos < 0 else ''}{whole}.{decimals}"


def parse_amount(text: str) -> int:
    """Picos of a decimal text. Raises: ConfigError when it is none, or finer than a pico."""
    try:
        picos = Decimal(text) * PICOS
        if picos.is_finite() and picos == int(picos):
            return int(picos)
    except InvalidOperation:
        pass
    raise ConfigError(f"{text!r} is no amount of money. Write for example 5 or 0.25.")
