"""The idempotency key of a tool call: the same call at the same place of a trajectory always has the same one.

Source: docs/agents.md; the form follows what the sandboxes' own log uses, so a live sandbox answers by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

KEY_BYTES = 16


def canonical(tool: str, arguments: Mapping[str, Any]) -> str:
    """Tool and arguments as one text: sorted JSON, no exponents in numbers, bytes as their digests.

    >>> canonical("shell", {"timeout": 1e3, "command": "ls"})
    '["shell",{"command":"ls","timeout":1000}]'
    """
    return _write([tool, dict(arguments)])


def call_key(trajectory: str, branch: int, call_index: int, form: str) -> str:
    """First 16 bytes, in hex, of SHA-256 over trajectory, branch, the call's number in it and its canonical form."""
    text = f"{trajectory}|{branch}|{call_index}|{form}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES].hex()


def attempt_key(key: str, attempt: int) -> str:
    """The key of a further attempt at a call whose outcome was lost and whose effects were taken back."""
    if attempt == 0:
        return key
    return hashlib.sha256(f"{key}|attempt {attempt}".encode()).digest()[:KEY_BYTES].hex()


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def _write(value: Any) -> str:
    if isinstance(value, bytes):
        return json.dumps(f"sha256:{digest(value)}")
    if isinstance(value, float):
        number = Decimal(repr(value))
        return f"{number.normalize():f}" if number.is_finite() else json.dumps(repr(value))
    if isinstance(value, Mapping):
        members = (f"{json.dumps(str(key), ensure_ascii=False)}:{_write(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_write, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
