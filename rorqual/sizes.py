"""Sizes as people write them: bytes (`512MiB`, `4GiB`, `1.5G`) and tokens (`8192`, `128K`, `1M`, `1Mi`)."""

import re
from decimal import Decimal

from rorqual.errors import ConfigError

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size; K, M, G and T count in steps of 1024. Raises: ConfigError naming the option."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} is {text!r}, which is no size. Write bytes, or for example 512MiB or 4GiB.")
    return int(float(found.group(1)) * 1024 ** _POWERS[found.group(2).upper()])


_TOKENS = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KM]?)(I?)", re.IGNORECASE)


def parse_tokens(text: str, option: str) -> int:
    """Tokens of a length: K and M are thousands and millions, as reports count; Ki and Mi are 2^10 and 2^20.

    Raises: ConfigError naming the option, also for part of a token.
    """
    found = _TOKENS.fullmatch(text.strip().replace(",", "").replace("_", ""))
    unit = "" if found is None else found.group(2).upper()
    if found is None or (found.group(3) and not unit):
        raise ConfigError(
            f"{option} is {text!r}, which is no number of tokens. Write for example 8192, 128K (thousands), 1M (a "
            "million) or 1Mi (2^20)."
        )
    tokens = Decimal(found.group(1)) * (1024 if found.group(3) else 1000) ** ("", "K", "M").index(unit)
    if tokens < 1 or tokens != int(tokens):
        raise ConfigError(f"{option} is {text!r}, which is {tokens} tokens. Give a whole number, at least 1.")
    return int(tokens)
