"""JSON Schema: what a value breaks, and the repairs that a schema itself allows.

Validation is jsonschema-rs, without any access to files or the network for references. On top: an object that lists its
properties and does not say whether there may be others has no others, since a tool cannot act on an argument that it
does not have.

A repair is made only where the schema leaves one reading: text that spells the number, boolean or null asked for, an
object or list inside a text, one item where a list is asked for, an enum value in other capitals, a key in another
spelling, null for what may be absent, a default. It is kept only if the value then breaks less than before.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import jsonschema_rs

from rorqual.errors import RequestError
from rorqual.referee.json_text import NotJson, dump, read_leniently, read_strictly
from rorqual.referee.reasons import Finding, failed, repaired

MOST_REPAIRS: Final = 32
_BACKTRACKS: Final = 100_000
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_DECIMAL = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?(?:[eE][+-]?\d{1,3})?")
_OPEN: Final = (
    "additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "not", "if",
    "$ref", "$dynamicRef", "dependentSchemas",
)  # fmt: skip
_RANGES: Final = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems",
    "maxItems", "minProperties", "maxProperties", "uniqueItems",
}  # fmt: skip
_CODES: Final = {
    "required": "required_missing", "type": "type_wrong", "enum": "enum_wrong", "constant": "enum_wrong",
    "additionalProperties": "extra_key", "unevaluatedProperties": "extra_key",
}  # fmt: skip
_SHOWN = 60

Path = tuple[str | int, ...]


class Schema:
    """A compiled schema. Raises: RequestError when it is none.

    closed: objects that list their properties have no others.
    """

    def __init__(self, schema: Any, where: str, *, closed: bool = True) -> None:
        self.source = _close(schema) if closed else schema
        try:
            self._validator = jsonschema_rs.validator_for(
                self.source,
                offline=True,
                pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=_BACKTRACKS),
            )
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError, TypeError) as error:
            raise RequestError(
                f"{where} is no JSON Schema that answers can be held to: {str(error).splitlines()[0][:200]}. Correct "
                "it, or leave the referee off.",
                param=where,
                code="schema_unusable",
            ) from None

    def accepts(self, value: Any) -> bool:
        return bool(self._validator.is_valid(value))

    def errors(self, value: Any) -> list[Any]:
        """jsonschema-rs's own errors."""
        return list(self._validator.iter_errors(value))

    @property
    def properties(self) -> Mapping[str, Any]:
        """Of the value itself, where they stand plainly."""
        found = self.source.get("properties") if isinstance(self.source, Mapping) else None
        return found if isinstance(found, Mapping) else {}


@lru_cache(maxsize=512)
def _compiled(text: str, closed: bool) -> Schema | RequestError:
    try:
        return Schema(json.loads(text), "schema", closed=closed)
    except RequestError as error:
        return error


def schema_of(schema: Any, where: str, *, closed: bool = True) -> Schema:
    """The schema, compiled once for all requests that have the same. Raises: RequestError naming `where`."""
    found = _compiled(json.dumps(schema, sort_keys=True), closed)
    if isinstance(found, RequestError):
        raise RequestError(found.message.replace("schema", where, 1), param=where, code=found.code)
    return found


def violations(schema: Schema, value: Any, call: int | None = None, label: str = "it") -> list[Finding]:
    """What the value breaks, in words for whoever wrote it."""
    out: list[Finding] = []
    for error in schema.errors(value):
        path = pointer(error.instance_path)
        name = _kind(error)
        code = _CODES.get(name, "range_wrong" if name in _RANGES else "arguments_invalid")
        at = f"{label}: `{path}`" if path else label
        out.append(failed(code, f"{at} {_words(error, name)}", call=call, path=path or None))
    return out


def pointer(path: Sequence[str | int]) -> str:
    """`items[0].name` for a place in a value."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def fit(
    schema: Schema, value: Any, call: int | None = None, aliases: Mapping[str, str] | None = None
) -> tuple[Any, list[Finding]]:
    """The value with what could be repaired, and the repairs. A valid value comes back as it is.

    aliases: names of arguments that stand for others.
    """
    done: list[Finding] = []
    if schema.accepts(value):
        return value, done
    value = copy.deepcopy(value)
    errors = schema.errors(value)
    for _ in range(MOST_REPAIRS):
        if not errors:
            break
        step = _one_repair(schema, value, errors, call, aliases or {})
        if step is None:
            break
        value, errors, finding = step
        done.append(finding)
    return value, done


def _one_repair(
    schema: Schema, value: Any, errors: Sequence[Any], call: int | None, aliases: Mapping[str, str]
) -> tuple[Any, list[Any], Finding] | None:
    """The first repair that leaves the value with fewer errors, or the same count of other ones further on."""
    before = {_identity(error) for error in errors}
    for error in _flat(errors):
        for path, code, says, change in _ideas(schema, error, aliases):
            trial = copy.deepcopy(value)
            try:
                trial = change(trial)
            except (KeyError, IndexError, TypeError):
                continue
            left = schema.errors(trial)
            if len(left) < len(errors) or (len(left) == len(errors) and not {_identity(one) for one in left} <= before):
                if len(left) >= len(errors) and code not in ("type_wrong",):
                    continue
                return trial, left, repaired(code, says, call=call, path=pointer(path) or None)
    return None


def _identity(error: Any) -> tuple[Any, ...]:
    return (*error.instance_path, "/", *error.schema_path, error.message)


def _kind(error: Any) -> str:
    return str(error.kind.name)


def _flat(errors: Sequence[Any]) -> Iterator[Any]:
    """The errors, and those of the branches of `anyOf` and `oneOf`."""
    for error in errors:
        yield error
        for branch in getattr(error.kind, "context", None) or ():
            yield from _flat(branch)


Idea = tuple[Path, str, str, Callable[[Any], Any]]


def _ideas(schema: Schema, error: Any, aliases: Mapping[str, str]) -> Iterator[Idea]:
    """Ways to repair one error, the surest first."""
    path: Path = tuple(error.instance_path)
    kind, here = _kind(error), pointer(error.instance_path) or "the arguments"
    if kind == "type":
        for new, how in _coerced(error.instance, list(error.kind.types)):
            yield path, "type_wrong", f"{here}: {how}", _setting(path, new)
        if error.instance is None and path and isinstance(path[-1], str):
            yield path, "type_wrong", f"{here}: null left out", _removing(path)
    elif kind in ("enum", "constant"):
        options = error.kind.options if kind == "enum" else [error.kind.expected_value]
        for option in _alike(error.instance, options):
            yield path, "enum_wrong", f"{here}: {_show(error.instance)} read as {_show(option)}", _setting(path, option)
        if error.instance is None and path and isinstance(path[-1], str):
            yield path, "enum_wrong", f"{here}: null left out", _removing(path)
    elif kind in ("additionalProperties", "unevaluatedProperties"):
        object_schema = _at(schema.source, list(error.schema_path)[:-1])
        known = object_schema.get("properties", {}) if isinstance(object_schema, Mapping) else {}
        for key in error.kind.unexpected:
            target = aliases.get(key) or _spelling(key, [name for name in known if name not in error.instance])
            if target is not None and target not in error.instance:
                yield path, "key_alias", f"{here}: `{key}` read as `{target}`", _renaming(path, key, target)
            if error.instance.get(key) is None:
                yield path, "extra_key", f"{here}: `{key}`, which is null, left out", _removing((*path, key))
    elif kind == "required":
        name = error.kind.property
        object_schema = _at(schema.source, list(error.schema_path)[:-1])
        inner = object_schema.get("properties", {}).get(name) if isinstance(object_schema, Mapping) else None
        if isinstance(inner, Mapping) and "default" in inner:
            says = f"{here}: `{name}` set to its default {_show(inner['default'])}"
            yield path, "required_missing", says, _setting((*path, name), inner["default"])


def _coerced(value: Any, types: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """What the value spells in one of the types asked for."""
    if isinstance(value, str):
        text = value.strip()
        if "integer" in types and _INTEGER.fullmatch(text):
            yield int(text), f"the text {_show(value)} read as a number"
        if "number" in types and _DECIMAL.fullmatch(text):
            number = int(text) if _INTEGER.fullmatch(text) else float(text)
            if math.isfinite(number):
                yield number, f"the text {_show(value)} read as a number"
        if "boolean" in types and text.lower() in ("true", "false"):
            yield text.lower() == "true", f"the text {_show(value)} read as a boolean"
        if "null" in types and text.lower() in ("null", "none", ""):
            yield None, f"the text {_show(value)} read as null"
        if ("object" in types and text[:1] == "{") or ("array" in types and text[:1] == "["):
            try:
                inner, _ = _read(text)
            except NotJson:
                inner = None
            if isinstance(inner, dict | list):
                yield inner, "JSON inside a text taken out"
    elif isinstance(value, bool):
        if "string" in types:
            yield "true" if value else "false", "the boolean written as text"
    elif isinstance(value, int | float):
        if "string" in types and isinstance(value, int):
            yield str(value), "the number written as text"
        if "integer" in types and isinstance(value, float) and value.is_integer():
            yield int(value), "the number written without a fraction"
    if "array" in types and not isinstance(value, list) and value is not None:
        yield [value], "one item put into a list"


def _read(text: str) -> tuple[Any, list[str]]:
    try:
        return read_strictly(text), []
    except NotJson:
        return read_leniently(text)


def _alike(value: Any, options: Sequence[Any]) -> Iterator[Any]:
    """The only option that differs in capitals, spaces and separators, or in type, alone."""
    if isinstance(value, str):
        found = [one for one in options if isinstance(one, str) and _plain(one) == _plain(value)]
        if len(found) == 1 and _plain(value):
            yield found[0]
        spelled = [one for one in options if not isinstance(one, str) and dump(one) == value.strip()]
        if len(spelled) == 1:
            yield spelled[0]
    elif isinstance(value, int) and not isinstance(value, bool):
        spelled = [one for one in options if isinstance(one, str) and one == str(value)]
        if len(spelled) == 1:
            yield spelled[0]


def _spelling(key: str, names: Sequence[str]) -> str | None:
    """The only name that is this key but for capitals and separators."""
    found = [name for name in names if _plain(name) == _plain(key)]
    return found[0] if len(found) == 1 and _plain(key) else None


def _plain(text: str) -> str:
    return re.sub(r"[\s_\-.]+", "", text).casefold()


def _at(schema: Any, path: Sequence[str | int]) -> Any:
    """The place in a schema that an error's path names; None where the path crosses a reference."""
    for part in path:
        try:
            schema = schema[part]
        except (KeyError, IndexError, TypeError):
            return None
    return schema


def _setting(path: Path, new: Any) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        if not path:
            return new
        holder = _at_value(value, path[:-1])
        holder[path[-1]] = new
        return value

    return change


def _removing(path: Path) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        del _at_value(value, path[:-1])[path[-1]]
        return value

    return change


def _renaming(path: Path, old: str, new: str) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        holder = _at_value(value, path)
        pairs = [(new if key == old else key, member) for key, member in holder.items()]
        holder.clear()
        holder.update(pairs)
        return value

    return change


def _at_value(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value


def _close(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where an object lists its properties and says nothing more.

    Branches of combinators and referenced definitions are left as they are: what one of them does not list may be
    listed beside it.
    """
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        closed["properties"] = {name: _close(inner) for name, inner in properties.items()}
        if not any(key in schema for key in _OPEN):
            closed["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            closed[key] = _close(schema[key])
    if isinstance(schema.get("prefixItems"), list):
        closed["prefixItems"] = [_close(inner) for inner in schema["prefixItems"]]
    return closed


def _words(error: Any, kind: str) -> str:
    if kind == "required":
        return f"lacks `{error.kind.property}`, which is required"
    if kind in ("additionalProperties", "unevaluatedProperties"):
        return "has no argument " + ", ".join(f"`{key}`" for key in error.kind.unexpected)
    if kind == "type":
        return f"is {_show(error.instance)}, not of type {' or '.join(sorted(error.kind.types))}"
    if kind == "enum":
        options = ", ".join(_show(option) for option in error.kind.options[:20])
        return f"is {_show(error.instance)}; allowed are {options}"
    return f"breaks `{kind}`: {error.message[:200]}"


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
