"""From the messages and blocks of an Anthropic request to the messages of a chat request.

The blocks of an assistant message become one message: its thinking, its text and its calls. Results become tool
messages, before the text of the user message they came in. A `system` message among the others becomes a reminder in
the user's turn. Source: DeepSeek's Anthropic guide, and its `deepseek-recipe` where the guide says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from rorqual.errors import RequestError
from rorqual.server.anthropic.schema import (
    TOOL_NAME,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from rorqual.server.errors import from_validation
from rorqual.server.schema import USER_ID, Body, ChatRequest

SENT_AS: Mapping[str, str] = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
}
"""Fields of the chat request that this dialect calls otherwise."""

_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
_REFUSED: Mapping[str, str] = {
    "redacted_thinking": "it holds reasoning that only the service which wrote it can read. Remove it.",
    "document": "this server reads text only. Send the document's text as a text block.",
    "search_result": "this server reads text only. Send it as a text block.",
    "container_upload": "this server has no containers. Remove it.",
}
_NO_SERVER_TOOLS = "this server runs no tools of its own. Remove it, or define a tool with an `input_schema`."
_Model = TypeVar("_Model", bound=Body)
_Path = tuple[str | int, ...]
_KINDS: Mapping[str, Mapping[str, type[Body]]] = {
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock},
    "system": {"text": TextBlock},
    "tool_result": {"text": TextBlock, "tool_reference": ToolReferenceBlock},
}


class ManyTools(ChatRequest):
    """Tools may have longer names here, and there may be any number of them."""

    tool_name = re.compile(TOOL_NAME)
    max_tools = None


def to_chat(body: MessagesRequest, keeps_reasoning: bool) -> ChatRequest:
    """keeps_reasoning: what was in thinking blocks that come back empty may be known here.

    Raises: RequestError naming the block or field at fault.
    """
    if body.thread is not None:
        raise RequestError(
            "thread refers to a conversation kept by the server, and this server stores none. Send the whole history "
            "in messages.",
            param="thread",
            code="thread_unsupported_request",  # the SDK's tool runner then goes on without
        )
    effort = body.output_config.effort if body.output_config is not None else None
    if effort == "none" and body.thinking is not None and body.thinking.type != "disabled":
        effort = None  # the switch itself goes first
    user = body.metadata.user_id if body.metadata is not None else None
    return ManyTools.model_validate(
        {
            "model": body.model,
            "messages": _messages(body, keeps_reasoning),
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "min_p": body.min_p,
            "seed": body.seed,
            "stop": body.stop_sequences or None,
            "stream": body.stream,
            "thinking": None if body.thinking is None else {"type": body.thinking.type},
            "reasoning_effort": effort,
            "response_format": _response_format(body),
            "tools": _tools(body.tools or []) or None,
            "tool_choice": _tool_choice(body),
            "user_id" if user is not None and USER_ID.fullmatch(user) else "user": user,
            "rorqual": None if body.rorqual is None else body.rorqual.model_dump(),
        }
    )


def _messages(body: MessagesRequest, keeps_reasoning: bool) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if body.system is not None:
        system = _joined(_blocks(body.system, "system", ("system",)))
        # Claude Code's first line is about its account and differs every time, so no cached prompt would ever match.
        system = _BILLING.sub("", system)
        if system:
            out.append({"role": "system", "content": system})
    # A client that asked for empty thinking blocks sends them back empty; what was in them may still be known here.
    is_omitted = body.thinking is not None and body.thinking.display == "omitted" and keeps_reasoning
    unanswered: list[str] = []
    for i, message in enumerate(body.messages):
        blocks = _blocks(message.content, message.role, ("messages", i, "content"))
        others = [block for block in blocks if not isinstance(block, ToolResultBlock)]
        for j, block in enumerate(blocks):
            if isinstance(block, ToolResultBlock):
                out.append(_result(block, unanswered, i, j))
        if others:
            _check_answered(unanswered, i)
            out.append(_message(message, others, is_omitted))
            unanswered = [block.id for block in others if isinstance(block, ToolUseBlock)]
    _check_answered(unanswered, len(body.messages))
    return out


def _message(message: InputMessage, blocks: Sequence[Body], is_omitted: bool) -> dict[str, Any]:
    text = _joined(blocks)
    if message.role == "system":
        return {"role": "user", "content": f"<system-reminder>\n{text}\n</system-reminder>"}
    if message.role == "user":
        return {"role": "user", "content": text}
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    reasoning = "\n\n".join(thoughts) if any(thoughts) or (thoughts and not is_omitted) else None
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, "tool_calls": calls or None}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: ToolResultBlock, unanswered: list[str], i: int, j: int) -> dict[str, Any]:
    if block.tool_use_id not in unanswered:
        raise RequestError(
            f"messages[{i}].content[{j}]: unexpected `tool_use_id` found in `tool_result` blocks: {block.tool_use_id}. "
            "Each `tool_result` block must have a corresponding `tool_use` block in the previous message.",
            param=f"messages[{i}].content[{j}].tool_use_id",
        )
    unanswered.remove(block.tool_use_id)
    parts = _blocks(block.content or "", "tool_result", ("messages", i, "content", j, "content"), may_be_empty=True)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(parts)}


def _check_answered(unanswered: Sequence[str], i: int) -> None:
    if unanswered:
        raise RequestError(
            f"messages[{i - 1}]: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{', '.join(unanswered)}. Each `tool_use` block must have a corresponding `tool_result` block in the next "
            "message.",
            param=f"messages[{i - 1}]",
        )


def _blocks(content: str | list[Any], holder: str, path: _Path, *, may_be_empty: bool = False) -> list[Body]:
    """The content as blocks, a text as one. holder: the role, or the block, that has it."""
    if isinstance(content, str):
        return [TextBlock.model_validate({"type": "text", "text": content})]
    if not content and not may_be_empty and holder != "system":
        raise RequestError(f"{_spell(path[:-1])}: all messages must have non-empty content.", param=_spell(path))
    return [_block(block, _KINDS[holder], (*path, j)) for j, block in enumerate(content)]


def _block(block: Any, kinds: Mapping[str, type[Body]], path: _Path) -> Body:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind in kinds:
        return _read(kinds[kind], block, path)
    where = _spell(path)
    if kind == "image":
        raise RequestError("This model does not support image. Send text only.", param=where)
    why = _REFUSED.get(str(kind))
    if why is None and re.fullmatch(r"(server|mcp)_tool_use|\w+_tool_result|mcp_tool_listing", str(kind)):
        why = _NO_SERVER_TOOLS
    if why is not None:
        raise RequestError(f"{where} is a block of type `{kind}`, which is not supported: {why}", param=where)
    if not isinstance(block, dict):
        raise RequestError(f'{where} is no block. Send {{"type": "text", "text": "..."}}, or one string.', param=where)
    if kind is None:
        raise RequestError(f"missing field `{where}.type`: it is required. Add it to the block.", param=f"{where}.type")
    expected = ", ".join(f"`{name}`" for name in kinds)
    raise RequestError(f"{where}.type: unknown variant `{kind}`, expected one of {expected}", param=f"{where}.type")


def _joined(blocks: Sequence[Body]) -> str:
    """The texts among the blocks, a blank line between two."""
    texts = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolReferenceBlock):
            texts.append(block.tool_name)
    return "\n\n".join(texts)


def _tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    out = [_tool(tool, i) for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in out]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RequestError(f"Two tools are named {twice[0]!r}. Tool names must be unique.", param="tools")
    return out


def _tool(tool: Any, i: int) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise RequestError(
            f"tools[{i}] is of type `{kind}`, which is not supported: {_NO_SERVER_TOOLS}", param=f"tools[{i}].type"
        )
    read = _read(Tool, tool, ("tools", i))
    function = {"name": read.name, "description": read.description or "", "parameters": read.input_schema}
    return {"type": "function", "function": function}


def _tool_choice(body: MessagesRequest) -> Any:
    choice = body.tool_choice
    if choice is None or choice.type in ("auto", "none"):
        return None if choice is None else choice.type
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise RequestError(
            "missing field `tool_choice.name`: it says which tool. Add it, or use the type `any`.",
            param="tool_choice.name",
        )
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(body: MessagesRequest) -> dict[str, Any] | None:
    form = body.output_config.format if body.output_config is not None else None
    form = form or body.output_format
    return None if form is None else {"type": "json_schema", "json_schema": {"schema": form.schema_}}


def _read(model: type[_Model], value: Any, path: _Path) -> _Model:
    """The value as `model`. Raises: RequestError that names what is wrong with it by its whole path."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation([{**one, "loc": (*path, *one["loc"])} for one in error.errors()]) from None


def _spell(path: _Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
