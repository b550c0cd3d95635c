"""Parts of the OpenAPI document for fields that are checked by hand, so that refusals have the API's own words."""

from __future__ import annotations

from typing import Any

from rorqual.server.tools import MAX_TOOLS


def within(least: int, most: int | None = None) -> Any:  # Any: pydantic types it too narrowly
    """A range for the OpenAPI document only: refusals of it have the API's own words."""
    bounds: dict[str, Any] = {"minimum": least} if most is None else {"minimum": least, "maximum": most}

    def write(schema: dict[str, Any]) -> None:
        for one in schema.get("anyOf", [schema]):
            if one.get("type") != "null":
                one.update(bounds)

    return write


TEXT_PART: Any = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
CONTENT: Any = {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}, {"type": "null"}]}
STOP: Any = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "maxItems": 16, "items": {"type": "string"}},
        {"type": "null"},
    ]
}
PINS: Any = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "minimum": 0}},
                ]
            },
        },
        {"type": "null"},
    ]
}
FUNCTION: Any = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
}
TOOLS: Any = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {"type": {"const": "function"}, "function": FUNCTION},
            },
        },
        {"type": "null"},
    ]
}
