"""One tool call while it is being read: turns parameters into the pieces of a JSON arguments text.

String values are escaped and passed on piece by piece. Values in JSON wait for their end, because only then
it is known whether they are JSON at all; if not, they become JSON strings.
"""

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ID_ALPHABET = string.ascii_letters + string.digits


def make_call_id(index: int) -> str:
    """Return an id in the hosted API's form: `call_`, two digits of the index, 24 random alphanumerics."""
    return f"call_{index:02d}_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(24))


class CallBuilder:
    """Collects one call. `index` is None for a call whose name could not be read."""

    def __init__(self, index: int | None, call_id: str, name: str) -> None:
        self.index = index
        self.id = call_id
        self.name = name
        self.is_broken = index is None
        self.has_text = False
        self.sampled: list[tuple[str, str, bool]] = []
        """Its parameters as they were written, (key, text, is_string), repeated ones too."""
        self._members: list[tuple[str, str]] = []
        self._key = ""
        self._is_string = True
        self._value: list[str] = []
        self._raw: list[str] = []

    @property
    def has_parameters(self) -> bool:
        return bool(self._members)

    @property
    def has_duplicates(self) -> bool:
        return len({key for key, _ in self._members}) < len(self._members)

    def open_value(self, key: str, is_string: bool) -> str:
        """Begin a parameter; return the arguments text to send now (none yet for a JSON value)."""
        self._key = key
        self._is_string = is_string
        self._value, self._raw = [], []
        return self._lead() + '"' if is_string else ""

    def add_value(self, text: str) -> str:
        """Add a piece of the value; return what can be sent now."""
        piece = json.dumps(text, ensure_ascii=False)[1:-1] if self._is_string else text
        self._value.append(piece)
        self._raw.append(text)
        return piece if self._is_string else ""

    def close_value(self) -> tuple[str, bool]:
        """End the parameter; return what can be sent now, and whether a JSON value was indeed JSON."""
        value = "".join(self._value)
        self.sampled.append((self._key, "".join(self._raw), self._is_string))
        if self._is_string:
            self._members.append((self._key, f'"{value}"'))
            return '"', True
        is_json = _is_json(value)
        if not is_json:
            value = json.dumps(value, ensure_ascii=False)
        piece = self._lead() + value
        self._members.append((self._key, value))
        return piece, is_json

    def close(self) -> str:
        """End the call; return the last piece of the arguments."""
        return "}" if self._members else "{}"

    def arguments(self) -> str:
        """Return the whole arguments text; a repeated parameter keeps its first place and last value."""
        members = dict(self._members)
        return "{" + ", ".join(f"{_dump(key)}: {value}" for key, value in members.items()) + "}"

    def _lead(self) -> str:
        return (", " if self._members else "{") + _dump(self._key) + ": "


def is_string_by_schema(tools: Sequence[Mapping[str, Any]] | None, name: str, key: str) -> bool:
    """Whether parameter `key` of tool `name` is text, for a tag that does not say; unknown ones are."""
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or function.get("name") != name:
            continue
        schema: Any = function
        for part in ("parameters", "properties", key):
            schema = schema.get(part) if isinstance(schema, Mapping) else None
        types = schema.get("type") if isinstance(schema, Mapping) else None
        if isinstance(types, str):
            return types == "string"
        return not isinstance(types, (list, tuple)) or not types or "string" in types
    return True


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
