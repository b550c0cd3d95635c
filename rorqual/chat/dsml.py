"""DSML, the markup of tool calls, on the writing side: schemas, calls, and the JSON style both use.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">raw text</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY2" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Attributes and values are not escaped. The reading side is in `parse.py` (strict) and `stream.py` (tolerant).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.chat import markers
from rorqual.chat.events import Parameters
from rorqual.chat.prompt import PromptWriter
from rorqual.errors import RequestError


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of an assistant message, checked: `parameters` are (key, text, is_string) in order."""

    id: str
    name: str
    parameters: Parameters


def dump_json(value: Any, where: str) -> str:
    """Dump in the style of the format: `", "` and `": "`, non-ASCII kept, key order kept.

    Raises: RequestError naming `where` for what JSON cannot hold.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{where} cannot be written as JSON ({error}), and the prompt needs it as JSON. "
            "Send only objects, arrays, strings, numbers, booleans and null.",
            param=where,
        ) from None


def call_parameters(arguments: Any, where: str) -> Parameters:
    """Split a call's arguments into (key, text, is_string), as the released encoder does.

    A JSON object becomes its members: strings raw, everything else dumped again, so `1.50` turns into `1.5`.
    What is not a JSON text (an empty string, a broken one, an object instead of a string) becomes the single
    parameter `arguments`. Raises: RequestError when it is JSON but not an object.
    """
    parsed = arguments
    is_json = False
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
            is_json = True
        except (ValueError, RecursionError):
            pass
    if not is_json:
        parsed = {"arguments": arguments}
    if not isinstance(parsed, dict):
        raise RequestError(
            f"{where} is the JSON {_json_kind(parsed)} {arguments[:60]}, but a call's arguments are named, "
            'so it cannot be rendered. Send a JSON object as text, for example "{\\"path\\": \\"a.txt\\"}".',
            param=where,
        )
    return tuple(
        (key, value, True) if isinstance(value, str) else (key, dump_json(value, where), False)
        for key, value in parsed.items()
    )


def _json_kind(value: Any) -> str:
    if value is None:
        return "value"
    return {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")


def write_calls(writer: PromptWriter, calls: Sequence[Call]) -> None:
    """Write the block of `calls` after a blank line; a call without parameters keeps an empty line."""
    writer.fixed("\n\n" + markers.CALLS_OPEN + "\n")
    for call in calls:
        writer.fixed(markers.INVOKE_OPEN + ' name="')
        writer.caller(call.name)
        writer.fixed('">\n')
        for i, (key, text, is_string) in enumerate(call.parameters):
            writer.fixed(("\n" if i else "") + markers.PARAMETER_OPEN + ' name="')
            writer.caller(key)
            writer.fixed('" string="true">' if is_string else '" string="false">')
            writer.caller(text)
            writer.fixed(markers.PARAMETER_CLOSE)
        writer.fixed("\n" + markers.INVOKE_CLOSE + "\n")
    writer.fixed(markers.CALLS_CLOSE)


def write_tools(writer: PromptWriter, functions: Sequence[Any], where: str) -> None:
    """Write the tools block for the `function` objects of a request's tools, one schema a line."""
    writer.fixed(markers.TOOLS_BEFORE_SCHEMAS)
    for i, function in enumerate(functions):
        writer.caller(("\n" if i else "") + dump_json(function, f"{where}[{i}].function"))
    writer.fixed(markers.TOOLS_AFTER_SCHEMAS)


def write_response_format(writer: PromptWriter, schema: Any, where: str) -> None:
    """Write the response-format block."""
    writer.fixed(markers.RESPONSE_FORMAT_HEADING)
    writer.caller(dump_json(schema, where))
