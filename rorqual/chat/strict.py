"""Schemas of strict tools: the part of JSON Schema that DeepSeek's API takes, checked before anything is generated.

Source: DeepSeek's API documentation, strict mode. The hosted beta base asks it of all functions of a request; here each
strict function is checked by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from rorqual.errors import RequestError

FORMATS: Final = ("email", "hostname", "ipv4", "ipv6", "uuid")
MAX_DEPTH: Final = 64
MAX_NODES: Final = 5000

_ANYWHERE: Final = {"description", "title", "default", "examples", "enum", "const", "$schema", "$id", "$comment"}
_OF_TYPE: Final[dict[str, set[str]]] = {
    "object": {"properties", "required", "additionalProperties"},
    "string": {"pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items"},
    "boolean": set(),
    "null": set(),
}
_DEFINITIONS: Final = ("$def", "$defs", "definitions")


def check_strict_schema(schema: Any, where: str) -> None:  # Any: whatever JSON holds
    """Raises: RequestError naming the place in the schema that strict mode does not take, and what to write."""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        _refuse(where, "must be an object schema", 'Write {"type": "object", "properties": ...}.')
    _Checker(schema).check(schema, where, 0)


class _Checker:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._nodes = 0

    def check(self, schema: Any, where: str, depth: int) -> None:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            _refuse(where, f"is nested over {MAX_DEPTH} deep or has over {MAX_NODES} parts", "Send a simpler schema.")
        if not isinstance(schema, Mapping):
            _refuse(where, "is not a schema", "Write an object with a type.")
        for name in _DEFINITIONS:
            for key, inner in self._members(schema.get(name, {}), f"{where}.{name}"):
                self.check(inner, f"{where}.{name}.{key}", depth + 1)
        if "$ref" in schema:
            resolve(self._root, schema, where)
            return
        if "anyOf" in schema:
            if not isinstance(schema["anyOf"], list) or not schema["anyOf"]:
                _refuse(f"{where}.anyOf", "is no list of schemas", "List at least one.")
            for i, inner in enumerate(schema["anyOf"]):
                self.check(inner, f"{where}.anyOf[{i}]", depth + 1)
            self._keywords(schema, {"anyOf"}, where)
            return
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds and not ("enum" in schema or "const" in schema):
            _refuse(where, "has no type", "Give it one of " + ", ".join(_OF_TYPE) + ", or an enum or anyOf.")
        known: set[str] = {"type"}
        for kind in kinds:
            if kind not in _OF_TYPE:
                _refuse(f"{where}.type", f"is {kind!r}", "Use one of " + ", ".join(_OF_TYPE) + ".")
            known |= _OF_TYPE[kind]
        self._keywords(schema, known, where)
        if "object" in kinds:
            self._object(schema, where, depth)
        if "array" in kinds and "items" in schema:
            self.check(schema["items"], f"{where}.items", depth + 1)
        if schema.get("format", FORMATS[0]) not in FORMATS:
            _refuse(f"{where}.format", f"is {schema['format']!r}", f"Use one of {', '.join(FORMATS)}, or a pattern.")

    def _object(self, schema: Mapping[str, Any], where: str, depth: int) -> None:
        properties = dict(self._members(schema.get("properties", {}), f"{where}.properties"))
        required = schema.get("required", [])
        absent = [name for name in properties if not isinstance(required, list) or name not in required]
        if absent:
            _refuse(f"{where}.required", f"leaves out {', '.join(absent)}", "List every property as required.")
        if schema.get("additionalProperties") is not False:
            _refuse(f"{where}.additionalProperties", "is not false", 'Set "additionalProperties": false.')
        for name, inner in properties.items():
            self.check(inner, f"{where}.properties.{name}", depth + 1)

    @staticmethod
    def _members(value: Any, where: str) -> list[tuple[str, Any]]:
        if not isinstance(value, Mapping):
            _refuse(where, "is no object", "Give each name its schema.")
        return list(value.items())

    @staticmethod
    def _keywords(schema: Mapping[str, Any], known: set[str], where: str) -> None:
        for key in schema:
            if key not in known | _ANYWHERE and key not in _DEFINITIONS:
                _refuse(f"{where}.{key}", "is not supported in strict mode", "Remove it, or leave strict out.")


def resolve(root: Mapping[str, Any], schema: Any, where: str) -> Any:
    """The schema that `schema` stands for: itself, or what its `$ref` points to inside `root`.

    Raises: RequestError for a reference to nowhere, elsewhere or in a circle.
    """
    seen: set[str] = set()
    while isinstance(schema, Mapping) and "$ref" in schema:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#") or reference in seen:
            _refuse(f"{where}.$ref", f"is {reference!r}", 'Point into the same schema: "#/$defs/NAME".')
        seen.add(reference)
        schema = root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(schema, Mapping) or name not in schema:
                _refuse(f"{where}.$ref", f"is {reference!r}, and there is nothing", "Define it under $defs.")
            schema = schema[name]
    return schema


def _refuse(where: str, what: str, fix: str) -> NoReturn:
    raise RequestError(f"{where} {what}, so calls could not be held to it. {fix}", param=where)
