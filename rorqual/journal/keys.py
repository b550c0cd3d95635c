"""The key under which a tool call is known, so that a resumed trajectory finds its result and runs nothing twice.

The key is the beginning of SHA-256 over trajectory, branch, number of the call and the call itself in canonical form:
JSON with sorted keys and no spaces, floats without exponents, byte strings as their SHA-256.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal

from rorqual.errors import JournalError

KEY_BYTES = 16


def canonical(value: object) -> str:
    """One text for equal values, whatever their dicts' order.

    Raises: JournalError when it holds what is no JSON, or a float that is not finite.
    """
    if value is None or isinstance(value, bool | int | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise JournalError(f"{value} has no canonical form. Give a finite number, or a string.")
        return format(Decimal(repr(value)), "f")
    if isinstance(value, bytes | bytearray | memoryview):
        return '{"sha256":"' + hashlib.sha256(value).hexdigest() + '"}'
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise JournalError(f"the key {key!r} has no canonical form. Keys of arguments are strings.")
        return "{" + ",".join(f"{json.dumps(k, ensure_ascii=False)}:{canonical(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    raise JournalError(f"a {type(value).__name__} has no canonical form. Arguments are JSON values and bytes.")


def call_key(
    trajectory: str,
    branch: int,
    call_index: int,
    tool: str,
    arguments: object,
    *,
    stdin: bytes | None = None,
    cwd: str | None = None,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """The 16 bytes that name a call. `call_index` counts the calls of a branch from 0; `env`: what the call sets."""
    call = [tool, arguments, stdin, cwd, user, dict(env or {})]
    text = canonical([trajectory, branch, call_index, call])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]
