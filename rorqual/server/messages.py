"""From the messages of a request to the token ids of a prompt.

The checks are those the hosted API was seen to make, in its words where it has words, so that clients which
work there work here. Source: DeepSeek's API documentation and its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.server.schema import ChatRequest, Message
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import ASSISTANT, END_THINK, THINK

_FIELDS_OF_ROLE = {
    "assistant": {"role", "content", "name", "reasoning_content", "tool_calls", "prefix"},
    "tool": {"role", "content", "tool_call_id"},
}
_FIELDS_OF_OTHERS = {"role", "content", "name"}
_WITHOUT_HEADER = ("system", "assistant")


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt ready for the engine, and what is needed to read the reply."""

    tokens: list[int]
    thinking: bool
    tools: list[dict[str, Any]]  # those the model was shown


def build_prompt(body: ChatRequest, tokenizer: Tokenizer, revision: str) -> ChatPrompt:
    """Check the messages, render them and encode them; text of callers never becomes a control token.

    Raises: RequestError naming the message and the fix.
    """
    mode, effort = chat.resolve_effort(body.reasoning_effort, revision)
    if body.thinking is not None and body.thinking.type == "disabled":
        mode, effort = "chat", None
    thinking = mode == "thinking"
    tools = [] if body.tool_choice == "none" else list(body.tools or [])
    messages = [_render_form(message, i) for i, message in enumerate(body.messages)]
    if not messages:
        raise RequestError("Empty input messages. Send at least one message.", param="messages")
    _check_order(body.messages)
    if thinking:
        _check_reasoning(body.messages)
    rendered = chat.render_messages(
        messages, tools or None, thinking_mode=mode, reasoning_effort=effort, revision=revision
    )
    pieces = [*rendered.pieces(), *_missing_header(body.messages, thinking)]
    return ChatPrompt(tokenizer.encode_guarded(pieces), thinking, tools)


def _render_form(message: Message, index: int) -> dict[str, Any]:
    """The message as the encoder takes it: `developer` as `system`, text parts as one string."""
    where = f"messages[{index}]"
    allowed = _FIELDS_OF_ROLE.get(message.role, _FIELDS_OF_OTHERS)
    for name in message.model_fields_set - allowed:
        if getattr(message, name) is not None:
            raise RequestError(
                f"{where}.{name} has no meaning on a message with role `{message.role}`. Remove it.",
                param=f"{where}.{name}",
            )
    if message.prefix:
        raise RequestError(
            f"{where}.prefix is true, but continuing an assistant message is not supported yet. "
            "Use POST /beta/completions to continue plain text.",
            param=f"{where}.prefix",
        )
    form: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    form["content"] = _text(message.content, f"{where}.content")
    if message.role == "tool":
        if message.tool_call_id is None:
            raise RequestError(
                f"{where}: missing field `tool_call_id`: it says which call this answers. Add it.",
                param=f"{where}.tool_call_id",
            )
        form["tool_call_id"] = message.tool_call_id
    elif message.role == "assistant":
        if form["content"] is None and not message.tool_calls:
            raise RequestError(
                f"{where}: an assistant message needs `content` or `tool_calls`; set one of the two.",
                param=f"{where}.content",
            )
        form["reasoning_content"] = message.reasoning_content
        form["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls or []]
    if form["content"] is None:
        if message.role != "assistant":
            raise RequestError(f"{where}: missing field `content`. Add it.", param=f"{where}.content")
        form["content"] = ""
    return form


def _text(content: Any, where: str) -> str | None:  # Any: whatever JSON holds
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{where}: invalid type: expected a string or a list of text parts. Send the text as a string.",
            param=where,
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "image", "input_image"):
            raise RequestError("This model does not support image. Send text only.", param=f"{where}[{i}]")
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise RequestError(
                f'{where}[{i}] is not a text part. Send {{"type": "text", "text": "..."}}, or one string.',
                param=f"{where}[{i}]",
            )
        texts.append(part["text"])
    return "\n\n".join(texts)


def _check_order(messages: Sequence[Message]) -> None:
    """Calls must be answered at once, and answers need a call."""
    open_ids: list[str] = []
    for i, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in open_ids:
                raise RequestError(
                    "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
                    f" (messages[{i}] answers {message.tool_call_id!r}, which no call before it has).",
                    param=f"messages[{i}]",
                )
            open_ids.remove(message.tool_call_id)
            continue
        _check_answered(open_ids, i)
        open_ids = [call.id for call in message.tool_calls or []]
    _check_answered(open_ids, len(messages))


def _check_answered(open_ids: Sequence[str], index: int) -> None:
    if open_ids:
        raise RequestError(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            "'tool_call_id', The following tool_call_ids did not have response messages: "
            f"{', '.join(open_ids)}. Add a message with role 'tool' for each.",
            param=f"messages[{index - 1}]",
        )


def _check_reasoning(messages: Sequence[Message]) -> None:
    """The check the hosted API was seen to make: reasoning must come back beside calls just answered."""
    if messages[-1].role != "tool":
        return
    last = next(message for message in reversed(messages) if message.role == "assistant")
    if last.reasoning_content is None:
        raise RequestError(
            "The `reasoning_content` in the thinking mode must be passed back to the API. Send each "
            "assistant message as it was received (an empty string passes), or switch thinking off.",
            param="messages",
        )


def _missing_header(messages: Sequence[Message], thinking: bool) -> Iterator[tuple[str, bool]]:
    """Open the assistant's turn where the encoder does not: after system, assistant or a lone reminder."""
    roles = [message.role for message in messages if message.role != "latest_reminder"]
    last = "system" if not roles or roles[-1] == "developer" else roles[-1]
    if last in _WITHOUT_HEADER:
        yield ASSISTANT, True
        yield THINK if thinking else END_THINK, True
