"""Small JSON Schemas with values that obey them, and the values in words.

A schema carries one feature besides plain members: an enum, an optional member, a default, an object in an object, a
list of objects, a pattern, a range, `anyOf`, or a reference to itself. Values are drawn from the schema alone, so what
a validator says of them is independent of how they were made. Source: evaluation specification, section 4.7.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from rorqual.data.tasks import words

FEATURES = (
    *("enum", "optional", "default", "object", "objects"),
    *("pattern", "range", "anyOf", "recursive"),
)
Schema = dict[str, Any]

_NAMES = ("name", "room", "city", "label", "owner", "level", "count", "size", "minutes", "loud", "urgent", "locked")
_ENUMS = {
    "colour": ("red", "green", "blue"),
    "speed": ("slow", "normal", "fast"),
    "mode": ("day", "night", "away"),
}
_PATTERNS: dict[str, Callable[[random.Random], str]] = {
    "^[a-z]{3}-[0-9]{2}$": lambda rng: f"{_letters(rng, 3)}-{rng.randrange(100):02d}",
    "^[A-Z][a-z]+$": lambda rng: words.invented_word(rng).capitalize(),
    "^[0-9]{4}$": lambda rng: f"{rng.randrange(10_000):04d}",
}


def draw_schema(rng: random.Random, feature: str) -> Schema:
    """An object schema whose first member has `feature`, beside one or two plain ones."""
    spare = list(_NAMES)
    rng.shuffle(spare)
    members: dict[str, Schema] = {}
    required: list[str] = []
    root: Schema = {"type": "object"}
    if feature == "recursive":
        root["$defs"] = {
            "part": _object(
                {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}}},
                ["name"],
            )
        }
        members["part"] = {"$ref": "#/$defs/part"}
    elif feature == "enum":
        name = rng.choice(tuple(_ENUMS))
        members[name] = {"type": "string", "enum": list(_ENUMS[name])}
    elif feature == "object":
        members["place"] = _plain_object(rng)
    elif feature == "objects":
        members["stops"] = {"type": "array", "minItems": 1, "items": _plain_object(rng)}
    elif feature == "anyOf":
        members["limit"] = {"anyOf": [{"type": "integer"}, {"type": "string", "enum": ["all", "none"]}]}
    elif feature == "pattern":
        members["code"] = {"type": "string", "pattern": rng.choice(tuple(_PATTERNS))}
    elif feature == "range":
        low = rng.randrange(1, 50)
        members["degree"] = {"type": "integer", "minimum": low, "maximum": low + rng.randrange(5, 30)}
    elif feature == "optional":
        members["note"] = {"type": "string"}
    else:
        assert feature == "default", feature
        members["retries"] = {"type": "integer", "default": rng.randrange(1, 6)}
    if feature not in ("optional", "default"):
        required += members
    for name in spare[: rng.choice((1, 2))]:
        members[name] = _leaf(name)
        required.append(name)
    return {**root, "properties": members, "required": required, "additionalProperties": False}


def draw_value(rng: random.Random, schema: Schema, root: Schema, depth: int = 0) -> Any:
    """A value that obeys `schema`, which stands somewhere in `root`. An optional member is there in half of all cases;
    one with a default then differs from it.
    """
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        schema = rng.choice(schema["anyOf"])
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema["type"]
    if kind == "object":
        needed = schema["required"]
        return {
            name: draw_value(rng, inner, root, depth + 1)
            for name, inner in schema["properties"].items()
            if name in needed or (rng.random() < 0.5 and depth < 4)
        }
    if kind == "array":
        return [draw_value(rng, schema["items"], root, depth + 1) for _ in range(rng.choice((1, 2)))]
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "integer":
        low, high = schema.get("minimum", 1), schema.get("maximum", 999)
        return rng.choice([n for n in range(low, high + 1) if n != schema.get("default")])
    if "pattern" in schema:
        return _PATTERNS[schema["pattern"]](rng)
    return words.invented_word(rng) if rng.random() < 0.6 else rng.choice(words.NOUNS)


def spoken(value: Any) -> str:
    """A value in words: members in round brackets, strings in double quotes, so that the text fixes every type.

    >>> spoken({"name": "velmar", "stops": [{"level": 3}, {"level": 4}]})
    '(name "velmar" and stops first (level 3), then (level 4))'
    """
    if isinstance(value, dict):
        return "(" + " and ".join(f"{name} {spoken(part)}" for name, part in value.items()) + ")"
    if isinstance(value, list):
        return "first " + ", then ".join(spoken(part) for part in value)
    return json.dumps(value)


def canonical(value: Any) -> str:
    """Text that is equal for equal values alone: `1`, `1.0`, `true` and `"1"` all differ."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def without_defaults(value: Any, schema: Schema) -> Any:
    """The value without top members that say what the schema's default says anyway."""
    if not isinstance(value, dict):
        return value
    members = schema.get("properties", {})
    return {
        name: part
        for name, part in value.items()
        if "default" not in members.get(name, {}) or canonical(part) != canonical(members[name]["default"])
    }


def faults(value: Any) -> Iterator[Any]:
    """Values that differ from `value` in one place: content, type, a member more or less, order."""
    if isinstance(value, dict):
        yield {**value, "extra": 1}
        for name, part in value.items():
            yield {key: inner for key, inner in value.items() if key != name}
            yield {key + "_" * (key == name): inner for key, inner in value.items()}
            for bad in faults(part):
                yield {**value, name: bad}
    elif isinstance(value, list):
        yield [*value, value[0]]
        yield value[1:]
        yield json.dumps(value)
        for bad in faults(value[0]):
            yield [bad, *value[1:]]
        if canonical(value[0]) != canonical(value[-1]):
            yield value[::-1]
    elif isinstance(value, bool):
        yield from (not value, json.dumps(value), int(value))
    elif isinstance(value, int):
        yield from (value + 1, float(value), str(value), [value], None)
    else:
        yield from (value + "s", value.swapcase() + "X", [value], None)


def _leaf(name: str) -> Schema:
    if name in ("level", "count", "size", "minutes"):
        return {"type": "integer"}
    return {"type": "boolean" if name in ("loud", "urgent", "locked") else "string"}


def _plain_object(rng: random.Random) -> Schema:
    names = rng.sample(_NAMES, 2)
    return _object({name: _leaf(name) for name in names}, names)


def _object(members: dict[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "properties": members, "required": required, "additionalProperties": False}


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count))
