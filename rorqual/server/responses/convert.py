"""From the items of a Responses request to the messages of a chat request.

Calls and reasoning join the assistant message they stand beside. A `custom` tool (free text instead of JSON, as
Codex's apply_patch) is shown to the model as a function with one text parameter. Source: DeepSeek's Responses guide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.errors import RequestError
from rorqual.server.content import read_content
from rorqual.server.responses.schema import ResponsesRequest
from rorqual.server.schema import USER_ID, ChatRequest

SENT_AS: Mapping[str, str] = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "messages": "input",
}
"""Fields of the chat request that this dialect calls otherwise."""

INPUT = "input"
"""The one parameter of a custom tool, as the model sees it."""


class LongNames(ChatRequest):
    """Tools may have longer names here."""

    tool_name = re.compile(r"[A-Za-z0-9_-]{1,128}")


_CALLS = ("function_call", "custom_tool_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


@dataclass
class Converted:
    """A chat request, the names of its custom tools, and what of the request had no effect."""

    body: ChatRequest
    custom: frozenset[str]
    ignored: list[str] = field(default_factory=list)


def to_chat(body: ResponsesRequest) -> Converted:
    """Raises: RequestError naming the item or field at fault."""
    ignored: list[str] = []
    tools, custom = _tools(body.tools or [], ignored)
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input or []
    messages = _Messages(custom, ignored)
    if body.instructions is not None:
        messages.out.append({"role": "system", "content": body.instructions})
    for i, item in enumerate(items):
        messages.add(item, f"input[{i}]")
    messages.close()
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages.out,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stream": body.stream,
        "tools": tools or None,
        "tool_choice": _tool_choice(body.tool_choice, tools),
        "response_format": _response_format(body),
        "rorqual": body.rorqual.model_dump() if body.rorqual is not None else None,
    }
    if body.user is not None:
        fields["user_id" if USER_ID.fullmatch(body.user) else "user"] = body.user
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or []):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return Converted(LongNames.model_validate(fields), custom, ignored)


class _Messages:
    """Collects messages; an assistant message stays open while items join it."""

    def __init__(self, custom: frozenset[str], ignored: list[str]) -> None:
        self.out: list[dict[str, Any]] = []
        self._custom, self._ignored = custom, ignored
        self._open: dict[str, Any] | None = None
        self._unanswered: list[str] = []

    def add(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise RequestError(f"{where} is not an item. Send an object with a type.", param=where)
        kind = item.get("type", "message" if "role" in item else None)
        if kind in _OUTPUTS:
            self._add_output(item, where)
        elif kind in _CALLS:
            self._add_call(item, kind, where)
        elif kind == "reasoning":
            self._add_reasoning(item, where)
        elif kind == "message":
            self._add_message(item, where)
        else:
            self._ignored.append(f"{where}: {kind}")

    def close(self) -> None:
        """The open assistant message is complete; its calls must have been answered."""
        if self._unanswered:
            raise RequestError(
                f"No tool output found for tool call {', '.join(self._unanswered)}. Send its output right after the "
                "calls, nothing in between.",
                param="input",
            )
        self._open = None

    def _assistant(self) -> dict[str, Any]:
        if self._open is None:
            self._open = {"role": "assistant", "content": None}
            self.out.append(self._open)
        return self._open

    def _add_message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise RequestError(
                f"{where}.role: unknown variant `{role}`, expected one of `user`, `assistant`, `system`, `developer`",
                param=f"{where}.role",
            )
        content = read_content(_without_images(item.get("content")), f"{where}.content")
        if content.text is None:
            raise RequestError(f"{where}: missing field `content`. Add it.", param=f"{where}.content")
        if role != "assistant":
            self.close()
            self.out.append({"role": role, "content": content.text})
            return
        if self._unanswered or (self._open is not None and self._open.get("tool_calls")):
            self.close()
        message = self._assistant()
        message["content"] = (message["content"] or "") + content.text

    def _add_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        parts = item.get("content") or []
        texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(
                f'{where}.content is no list of {{"type": "reasoning_text", "text": ...}}. Send the item as it came.',
                param=f"{where}.content",
            )
        if self._unanswered or (self._open is not None and (self._open.get("tool_calls") or self._open["content"])):
            self.close()
        if texts:  # without them only a summary or something encrypted is left of it
            message = self._assistant()
            message["reasoning_content"] = message.get("reasoning_content", "") + "".join(map(str, texts))

    def _add_call(self, item: Mapping[str, Any], kind: str, where: str) -> None:
        call_id, name = item.get("call_id"), item.get("name")
        text = item.get("arguments" if kind == "function_call" else "input")
        if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(text, str)):
            raise RequestError(
                f"{where}: a call needs call_id, name and {'arguments' if kind == 'function_call' else 'input'}, all "
                "texts. Send the item as it came.",
                param=where,
            )
        if self._open is not None and self._open.get("tool_calls") and not self._unanswered:
            self.close()  # the calls before it have been answered: another message
        arguments = text if kind == "function_call" else json.dumps({INPUT: text}, ensure_ascii=False)
        function = {"name": name, "arguments": arguments}
        self._assistant().setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._unanswered.append(call_id)

    def _add_output(self, item: Mapping[str, Any], where: str) -> None:
        call_id = item.get("call_id")
        if call_id not in self._unanswered:
            raise RequestError(
                f"No tool call found for tool output with call_id {call_id}. An output follows its call at once.",
                param=where,
            )
        content = read_content(_without_images(item.get("output")), f"{where}.output")
        self._unanswered.remove(call_id)
        self.out.append({"role": "tool", "tool_call_id": call_id, "content": content.text or ""})


def _without_images(content: Any) -> Any:
    """Images are replaced by a text that says so, as the hosted API does for models without vision."""
    if not isinstance(content, list):
        return content
    shown = {"type": "text", "text": "[image not shown: this model reads text only]"}
    return [shown if isinstance(part, dict) and part.get("type") == "input_image" else part for part in content]


def _tools(tools: Sequence[Any], ignored: list[str]) -> tuple[list[dict[str, Any]], frozenset[str]]:
    out: list[dict[str, Any]] = []
    custom: set[str] = set()
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            ignored.append(f"tools[{i}]: {kind}")
            continue
        function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
        if kind == "custom":
            text = {"type": "string"}
            function["parameters"] = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
            custom.add(str(function.get("name")))
        else:
            function |= {key: tool[key] for key in ("parameters", "strict") if tool.get(key) is not None}
        out.append({"type": "function", "function": function})
    names = [tool["function"].get("name") for tool in out]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"Two tools are named {twice!r}. Give each its own name.", param="tools")
    return out, frozenset(custom)


def _tool_choice(choice: Any, tools: Sequence[Any]) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") in ("function", "custom"):
        return {"type": "function", "function": {"name": choice.get("name")}}
    raise RequestError(
        f"tool_choice {json.dumps(choice)[:80]} is not supported: use `none`, `auto`, `required` or "
        '{"type": "function", "name": ...}.',
        param="tool_choice",
    )


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text is not None else None
    if form is None:
        return None
    if form.type == "json_schema":
        return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}
    return {"type": form.type}
