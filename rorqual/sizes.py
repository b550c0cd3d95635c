"""Sizes as people write them: `512MiB`, `4GiB`, `1.5G`, or plain bytes."""

import re

from rorqual.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size; K, M, G and T count in steps of 1024. Raises: ConfigError naming the option."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} is {text!r}, which is no size. Write bytes, or for example 512MiB or 4GiB.")
    return int(float(found.group(1)) * 1024 ** _POWERS[found.group(2).upper()])
