"""The tools of a chat request: their shape, strict schemas, and what `tool_choice` asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.errors import RequestError
from rorqual.server.refusals import unknown_field

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def check_tools(tools: Sequence[Any], name: re.Pattern[str] = NAME, most: int | None = MAX_TOOLS) -> None:
    """Raises: RequestError naming the tool that is none of chat completions' functions."""
    if most is not None and len(tools) > most:
        raise RequestError(f"tools holds {len(tools)} functions; at most {most} are allowed.", param="tools")
    for i, tool in enumerate(tools):
        _check_tool(tool, f"tools[{i}]", name)


def _check_tool(tool: Any, where: str, pattern: re.Pattern[str]) -> None:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
        raise RequestError(
            f'{where} must be {{"type": "function", "function": {{"name": ...}}}}; other kinds '
            "of tools are not supported.",
            param=where,
        )
    for holder, fields, path in (
        (tool, ("type", "function"), where),
        (function, _FUNCTION_FIELDS, f"{where}.function"),
    ):
        unknown = next((key for key in holder if key not in fields and holder[key] is not None), None)
        if unknown is not None:
            raise unknown_field(f"{path}.{unknown}")
    name = function.get("name")
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise RequestError(
            f"{where}.function.name is {name!r}: use 1 to 64 letters, digits, `_` and `-`.",
            param=f"{where}.function.name",
        )
    for key, kind, words in (
        ("description", str, "a text"), ("parameters", dict, "a JSON Schema object"), ("strict", bool, "true or false")
    ):  # fmt: skip
        value = function.get(key)
        if value is not None and not isinstance(value, kind):
            raise RequestError(
                f"{where}.function.{key} must be {words}; it is {type(value).__name__}.",
                param=f"{where}.function.{key}",
            )


def forced_call(tool_choice: Any, tools: Sequence[Mapping[str, Any]]) -> str | bool:
    """What `tool_choice` forces: a tool's name, True for any call, False for none.

    Without tools any value passes: there is nothing to choose from. Raises: RequestError for a value that is no choice.
    """
    if not tools or tool_choice in (None, "none", "auto"):
        return False
    if tool_choice == "required":
        return True
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or tool_choice.get("type") != "function":
        raise RequestError(
            f"tool_choice is {tool_choice!r}: expected one of `none`, `auto`, `required` or a tool.",
            param="tool_choice",
        )
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise RequestError(
            f"tool_choice asks for {name!r}, but the request's tools are {', '.join(names)}. Choose one of them.",
            param="tool_choice",
        )
    return name
