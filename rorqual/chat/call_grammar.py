"""Tool calls as a grammar, so that a sampler can hold a reply to them.

Text in llguidance's dialect of Lark, with the prompt format's markers as `⟦NAME⟧` (a tokenizer knows their ids). A call
is one of the request's tools; a strict one gets exactly the parameters of its schema in their order, texts raw and all
else as JSON, and any other tool any parameters in the format's form. Source of the form: DeepSeek's published encoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rorqual.chat.markers import DSML
from rorqual.chat.strict import check_strict_schema, resolve
from rorqual.errors import RequestError

_MARK: Final = f"⟦{DSML}⟧"
_JSON: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OCTET: Final = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX: Final = "[0-9a-fA-F]"
_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_FORMATS: Final = {
    "email": rf"[A-Za-z0-9_%+\-]+(\.[A-Za-z0-9_%+\-]+)*@({_LABEL}\.)+[A-Za-z]{{2,24}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,8}}",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": rf"({_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}|({_HEX}{{1,4}}:){{1,6}}:{_HEX}{{1,4}}|::{_HEX}{{1,4}}",
    "uuid": rf"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
}


def call_rules(tools: Sequence[Mapping[str, Any]], where: str = "tools") -> str:
    """Rules for calls of `tools`; `calls` is a whole block, without the `<` that it begins with.

    That one belongs to the text before it, as far as a lexer can tell.

    Raises: RequestError naming the place in a strict tool's schema that cannot be held to.
    """
    rules = [
        f'calls: {_MARK} "tool_calls>\\n" invoke ("\\n" invoke)* "\\n</" {_MARK} "tool_calls>"',
        "invoke: " + " | ".join(f"invoke_{i}" for i in range(len(tools))),
        r"RAW: /(?s:.*)<\//",
    ]
    needs_free = False
    for i, tool in enumerate(tools):
        function = tool["function"]
        begin = f'"<" {_MARK} {_text("invoke name=" + chr(34) + function["name"] + chr(34) + ">" + chr(10))}'
        end = f'"\\n</" {_MARK} "invoke>"'
        if function.get("strict"):
            body = f"params_{i}"
            rules += _strict_rules(i, function, f"{where}[{i}].function.parameters")
        else:
            body, needs_free = "free_params", True
        rules.append(f"invoke_{i}: {begin} {body} {end}")
    if needs_free:
        rules += [
            'free_params: | free_param ("\\n" free_param)*',
            f'free_param: "<" {_MARK} "parameter name=\\"" KEY "\\" string=\\"" free_value',
            f'free_value: "true\\">" RAW {_MARK} "parameter>" | "false\\">" any "</" {_MARK} "parameter>"',
            r"KEY: /[^\"\n<>]{1,128}/",
            "any: %json " + json.dumps({"x-guidance": _JSON}),
        ]
    return "\n".join(rules)


def reply_grammar(
    tools: Sequence[Mapping[str, Any]], *, forced: str | bool = False, schema: Mapping[str, Any] | None = None
) -> str | None:
    """The grammar of a reply after its reasoning; None where anything goes.

    tools: those the model was shown. forced: a tool's name, or True for any: the reply is a call and nothing else.
    schema: JSON Schema that the content obeys (`{"type": "object"}` for any object); a reply may then still be a call.
    Raises: RequestError for a schema that cannot be held to.
    """
    if isinstance(forced, str):
        tools = [tool for tool in tools if tool["function"]["name"] == forced]
    is_strict = any(tool["function"].get("strict") for tool in tools)
    if not forced and schema is None and not is_strict:
        return None
    rules = []
    if forced:
        starts = ['"\\n\\n<" calls']
    elif schema is not None:
        starts = ["content"] + (['"\\n\\n<" calls'] if tools else [])
        options = schema.get("x-guidance", {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,40}"})
        rules.append("content: %json " + json.dumps({**schema, "x-guidance": options}))
    else:  # any text, perhaps with calls behind it
        starts = ["TEXT", "TEXT_AND_LESS calls"]
        rules += [r"TEXT: /(?s:.*)/", r"TEXT_AND_LESS: /(?s:.*)\n\n</"]
    rules.insert(0, "start: " + " | ".join(starts))
    if tools:
        rules.append(call_rules(tools))
    return "\n".join(rules)


def _strict_rules(i: int, function: Mapping[str, Any], where: str) -> Iterator[str]:
    root = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    check_strict_schema(root, where)
    names = list(root.get("properties", {}))
    params = [f"param_{i}_{j}" for j in range(len(names))]
    yield f"params_{i}: " + ' "\\n" '.join(params)
    for j, name in enumerate(names):
        opening = _text(f'parameter name="{name}" string="')
        values = list(_values(root, root["properties"][name], f"{where}.properties.{name}", f"value_{i}_{j}", 0))
        yield (
            f'param_{i}_{j}: "<" {_MARK} {opening} (' + " | ".join(use for use, _ in values) + f') {_MARK} "parameter>"'
        )
        for _, rule in values:
            if rule:
                yield rule


def _values(root: Mapping[str, Any], schema: Any, where: str, name: str, depth: int) -> Iterator[tuple[str, str]]:
    """Ways to write a value, each with a rule it needs: `true">` and a raw text, or `false">` and JSON, up to `</`."""
    schema = resolve(root, schema, where)
    if depth > 8:
        raise RequestError(f"{where} leads through too many references. Write the schema out.", param=where)
    if "anyOf" in schema:
        for k, inner in enumerate(schema["anyOf"]):
            yield from _values(root, inner, f"{where}.anyOf[{k}]", f"{name}_{k}", depth + 1)
        return
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        for k, one in enumerate(choices):
            yield from _choice(one, f"{name}_{k}")
        return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if "string" in kinds:
        use, rule = _raw(schema, name)
        yield f'"true\\">" {use}', rule
        kinds.remove("string")
    if kinds:
        definitions = {key: root[key] for key in ("$def", "$defs", "definitions") if key in root}
        own = {**definitions, **schema, "type": kinds, "x-guidance": _JSON}
        yield f'"false\\">" {name}_json "</"', f"{name}_json: %json {json.dumps(own)}"


def _choice(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield _text(f'true">{value}</'), ""
    else:
        yield _text(f'false">{json.dumps(value, ensure_ascii=False)}</'), ""


def _raw(schema: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A raw text as a lexeme that ends with `</`."""
    pattern = schema.get("pattern")
    if pattern is None and schema.get("format") in _FORMATS:
        pattern = f"^({_FORMATS[schema['format']]})$"
    if pattern is None:
        return "RAW", ""
    begin = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    inner = inner if end else inner.removesuffix("$")
    return f"{name.upper()}_RAW", f"{name.upper()}_RAW: /{begin}({_slashes_escaped(inner)}){end}<\\//"


def _slashes_escaped(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    pattern = pattern.replace("\n", r"\n").replace("\r", r"\r")
    return re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", pattern, flags=re.DOTALL)


def _text(text: str) -> str:
    """A literal; ASCII, so that nothing in it looks like a marker."""
    return json.dumps(text)
