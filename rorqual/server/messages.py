"""From the messages of a request to the token ids of a prompt.

The checks are those the hosted API was seen to make, in its words where it has words, so that clients which
work there work here. Source: DeepSeek's API documentation and its observed behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.referee import Restored
from rorqual.server import aliases
from rorqual.server.content import read_content
from rorqual.server.schema import ChatRequest, Message
from rorqual.server.served import ServedModel
from rorqual.server.service import Service
from rorqual.tokenizer.special import ASSISTANT, END_THINK, THINK

_FIELDS_OF_ROLE = {
    "assistant": {
        "role",
        "content",
        "name",
        "reasoning_content",
        "reasoning",
        "refusal",
        "tool_calls",
        "prefix",
        "annotations",
        "audio",
        "reasoning_details",
        "thinking_blocks",
        "provider_specific_fields",
    },
    "tool": {"role", "content", "name", "tool_call_id"},
}
_FIELDS_OF_OTHERS = {"role", "content", "name"}
_WITHOUT_HEADER = ("system", "assistant")


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt ready for the engine, and what is needed to read the reply."""

    tokens: list[int]
    thinking: bool
    opens_reasoning: bool  # the reply begins inside the reasoning
    tools: list[dict[str, Any]]  # those the model was shown
    messages: list[dict[str, Any]]  # as rendered
    restored: Restored | None  # what a client had changed; None where nothing is put back


def build_prompt(
    body: ChatRequest, served: ServedModel, service: Service, owner: str, reasoning_name: str = "reasoning_content"
) -> ChatPrompt:
    """Check the messages, render them and encode them; text of callers never becomes a control token.

    owner: whose conversation it is, for reasoning that is put back.
    Raises: RequestError naming the message and the fix.
    """
    mode, effort = _mode(body, served.revision)
    thinking = mode == "thinking"
    tools = [] if body.tool_choice == "none" else list(body.tools or [])
    messages = [_render_form(message, i) for i, message in enumerate(body.messages)]
    if not messages:
        raise RequestError("Empty input messages. Send at least one message.", param="messages")
    _check_order(body.messages)
    _check_prefix(body)
    restored = None
    if service.continuity is not None:
        restored = service.continuity.restore(owner, messages, thinking)
        messages = [dict(message) for message in restored.messages]
    elif thinking:
        of_all = bool(tools) and service.behaviour.documented_reasoning_check
        _check_reasoning(messages, of_all, reasoning_name)
    rendered = chat.render_messages(
        messages, tools or None, thinking_mode=mode, reasoning_effort=effort, revision=served.revision
    )
    pieces, opens = list(rendered.pieces()), thinking
    if body.messages[-1].prefix:
        opens = thinking and not messages[-1]["content"]
        if opens and pieces[-1] == (END_THINK, True):  # the reasoning itself is to be continued
            pieces.pop()
    else:
        pieces += _missing_header(body.messages, thinking)
    return ChatPrompt(served.tokenizer.encode_guarded(pieces), thinking, opens, tools, messages, restored)


def _mode(body: ChatRequest, revision: str) -> tuple[str, str | None]:
    """Thinking mode and effort: what the request says, or else what the model's name does."""
    mode, effort = chat.resolve_effort(body.reasoning_effort, revision)
    says = body.thinking.type != "disabled" if body.thinking is not None else None
    if says is None and body.reasoning_effort is None:
        says = aliases.thinks(body.model)
    return ("chat", None) if says is False else (mode, effort)


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
    form: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content = read_content(message.content, f"{where}.content", is_assistant=message.role == "assistant")
    form["content"] = content.text
    if message.role == "tool":
        if message.tool_call_id is None:
            raise RequestError(
                f"{where}: missing field `tool_call_id`: it says which call this answers. Add it.",
                param=f"{where}.tool_call_id",
            )
        form["tool_call_id"] = message.tool_call_id
    elif message.role == "assistant":
        form["content"] = content.text if content.text is not None else message.refusal
        if form["content"] is None and not message.tool_calls:
            raise RequestError(
                f"{where}: an assistant message needs `content` or `tool_calls`; set one of the two.",
                param=f"{where}.content",
            )
        given = (message.reasoning_content, message.reasoning, content.reasoning)
        form["reasoning_content"] = next((text for text in given if text is not None), None)
        if message.prefix:
            form |= {"wo_eos": True, "reasoning_content": form["reasoning_content"] or ""}
        form["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls or []]
    if form["content"] is None:
        if message.role != "assistant":
            raise RequestError(f"{where}: missing field `content`. Add it.", param=f"{where}.content")
        form["content"] = ""
    return form


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


def _check_prefix(body: ChatRequest) -> None:
    """Only the last message can be continued, and only as text."""
    for i, message in enumerate(body.messages):
        if not message.prefix:
            continue
        where = f"messages[{i}].prefix"
        if i < len(body.messages) - 1:
            raise RequestError(f"{where} is true, but only the last message can be continued. Remove it.", param=where)
        is_text = body.response_format is None or body.response_format.type == "text"
        if message.tool_calls or not is_text or body.tool_choice not in (None, "none", "auto"):
            raise RequestError(
                f"{where} is true, and the message or the request asks for calls or JSON, which cannot begin in the "
                "middle of a text. Leave out one of them.",
                param=where,
            )


def _check_answered(open_ids: Sequence[str], index: int) -> None:
    if open_ids:
        raise RequestError(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            "'tool_call_id', The following tool_call_ids did not have response messages: "
            f"{', '.join(open_ids)}. Add a message with role 'tool' for each.",
            param=f"messages[{index - 1}]",
        )


def _check_reasoning(messages: Sequence[Mapping[str, Any]], of_all: bool, name: str) -> None:
    """Refuse what the hosted API was seen to: calls just answered without their reasoning.

    of_all: as it is documented, any assistant message without.
    """
    if of_all:
        asked = [message for message in messages if message["role"] == "assistant"]
    elif messages[-1]["role"] == "tool":
        asked = [next(message for message in reversed(messages) if message["role"] == "assistant")]
    else:
        return
    if any(message["reasoning_content"] is None for message in asked):
        raise RequestError(
            f"The `{name}` in the thinking mode must be passed back to the API. Send each "
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
