"""Reads the messages of a request into `Turn`s, checking every field the format looks at.

A message is a mapping in the OpenAI shape. Whatever would fail later, or would render as something the sender
did not mean, is refused here with the name of the field. Fields the format does not know are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rorqual.chat import markers
from rorqual.chat.dsml import Call, call_parameters
from rorqual.chat.prompt import Marker
from rorqual.errors import RequestError

Text = tuple[str, ...]
"""Pieces of text in order; a `Marker` piece is a token the encoder put there."""

IMAGE_TYPES = ("image", "image_url")
BLOCKS_JOIN = "\n\n"


@dataclass(slots=True)
class Block:
    """A part of a user turn; `call_id` is None unless it is a tool result (then the id, or "")."""

    pieces: Text
    call_id: str | None = None


@dataclass(slots=True)
class Turn:
    """A message, checked: user turns have `blocks`, all others `content`; `where` names it in errors."""

    role: str
    where: str
    content: Text = ()
    blocks: list[Block] | None = None
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    tools_where: str = ""
    response_format: Any = None
    task: str | None = None
    is_open: bool = False
    index: int = -1
    """Place of the message in its list; -1 for a turn that was put in."""

    @property
    def is_user(self) -> bool:
        return self.role in ("user", "developer")


def read_messages(messages: Any, revision: str, where: str) -> list[Turn]:
    """Check `messages` and return one `Turn` each. Raises: RequestError naming the field and what to do."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        _refuse(
            where,
            f"is {_kind(messages)}, but a conversation is a list of messages",
            'Send a list such as [{"role": "user", "content": "Hello"}].',
        )
    return [_read_message(message, revision, f"{where}[{i}]", i) for i, message in enumerate(messages)]


def _read_message(message: Any, revision: str, where: str, index: int) -> Turn:
    if not isinstance(message, Mapping):
        _refuse(where, f"is {_kind(message)}, not a message", 'Send an object with "role" and "content".')
    role = message.get("role")
    if role not in markers.ROLES:
        _refuse(
            f"{where}.role",
            f"is {role!r}, which has no place in the prompt format",
            f"Use one of {', '.join(markers.ROLES)}.",
        )
    turn = Turn(role, where, task=_read_task(message, where), is_open=bool(message.get("wo_eos")), index=index)
    reader = _ContentReader(revision)
    if role == "user":
        turn.blocks = reader.user_blocks(message, where)
    elif role == "tool":
        turn.blocks = [_result_block(message, reader.tool_content(message, where), where)]
    else:
        turn.content = reader.plain_content(message, role, where)
    # The April encoder forgets `tools` on user turns when it merges them; on tool messages both do.
    if role != "tool" and (role != "user" or revision != "2026-04"):
        turn.tools_where = f"{where}.tools"
        turn.tools = read_tools(message.get("tools"), turn.tools_where)
    if role in ("system", "developer"):
        turn.response_format = message.get("response_format")
    if role == "assistant":
        turn.reasoning = reader.reasoning(message, where)
        turn.calls = _read_calls(message.get("tool_calls"), f"{where}.tool_calls")
    return turn


@dataclass(frozen=True, slots=True)
class _ContentReader:
    """Reads content fields; lists and images exist from revision 2026-07 on (and in tool results always)."""

    revision: str

    @property
    def takes_lists(self) -> bool:
        return self.revision != "2026-04"

    def plain_content(self, message: Mapping[str, Any], role: str, where: str) -> Text:
        """Content of a system, developer, assistant or reminder message."""
        content = message.get("content")
        where = f"{where}.content"
        if content is None and role in ("system", "assistant"):
            return ()
        if isinstance(content, list) and self.takes_lists:
            texts = [p for i, b in enumerate(content) if (p := self._text_or_image(b, f"{where}[{i}]")) is not None]
            pieces = join_pieces([(text,) for text in texts])
        else:
            pieces = (self._string(content, where),)
        if role == "developer" and not "".join(pieces):
            _refuse(
                where,
                "is empty, and a developer message without text cannot be rendered",
                "Send text or drop it.",
            )
        return pieces

    def user_blocks(self, message: Mapping[str, Any], where: str) -> list[Block]:
        """Blocks of a user message: its `content`, or the already-merged form in `content_blocks`."""
        blocks = message.get("content_blocks")
        content = message.get("content")
        if isinstance(blocks, list) and (self.takes_lists or content is None):
            return [self._block(block, f"{where}.content_blocks[{i}]") for i, block in enumerate(blocks)]
        if isinstance(content, list) and self.takes_lists:
            return [self._block(block, f"{where}.content[{i}]") for i, block in enumerate(content)]
        return [Block((self._string(content, f"{where}.content"),))]

    def tool_content(self, message: Mapping[str, Any], where: str) -> Text:
        """Content of a tool result; null prints as Python's None, as the checkpoints were trained."""
        where = f"{where}.content"
        if "content" not in message:
            _refuse(where, "is missing, so the result of the call is unknown", 'Send "" if there is no output.')
        content = message["content"]
        if content is None:
            return ("None",)
        if not isinstance(content, list):
            return (self._string(content, where),)
        if not self.takes_lists:
            return join_pieces([(_april_part(part, f"{where}[{i}]"),) for i, part in enumerate(content)])
        texts = [p for i, b in enumerate(content) if (p := self._text_or_image(b, f"{where}[{i}]")) is not None]
        return join_pieces([(text,) for text in texts])

    def reasoning(self, message: Mapping[str, Any], where: str) -> str:
        value = message.get("reasoning_content")
        return "" if value is None else self._string(value, f"{where}.reasoning_content")

    def _block(self, block: Any, where: str) -> Block:
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            inner = self.tool_content(block, where)
            return _result_block({"tool_call_id": block.get("tool_use_id")}, inner, where)
        text = self._text_or_image(block, where)
        return Block((text if text is not None else f"[Unsupported {block['type']}]",))

    def _text_or_image(self, block: Any, where: str) -> str | None:
        """Text of a text block, the placeholder of an image block, None for any other type."""
        kind = _block_type(block, where)
        if kind == "text":
            return self._string(block.get("text"), f"{where}.text")
        if kind in IMAGE_TYPES and self.takes_lists:
            return Marker(markers.IMAGE)
        return None

    def _string(self, value: Any, where: str) -> str:
        if isinstance(value, list):
            _refuse(
                where,
                "is a list, but revision 2026-04 of the prompt format takes content as one string",
                "Join the text parts into one string, or use a checkpoint of revision 2026-07.",
            )
        if not isinstance(value, str):
            _refuse(where, f"is {_kind(value)}, but only text can be rendered", 'Send a string; "" means empty.')
        if self.takes_lists and markers.IMAGE in value:
            _refuse(
                where,
                f"contains {markers.IMAGE}, which stands for an image and would be taken for one",
                "Remove it from the text, or send the image as an image_url block.",
            )
        return value


def join_pieces(parts: Sequence[Text]) -> Text:
    """Join texts with a blank line between them."""
    joined: list[str] = []
    for i, part in enumerate(parts):
        joined += (BLOCKS_JOIN, *part) if i else part
    return tuple(joined)


def _result_block(message: Mapping[str, Any], content: Text, where: str) -> Block:
    call_id = message.get("tool_call_id")
    if call_id is not None and not isinstance(call_id, str):
        _refuse(
            f"{where}.tool_call_id",
            f"is {_kind(call_id)}, so it matches no call",
            "Send the id of the call as a string.",
        )
    return Block((markers.RESULT_OPEN, *content, markers.RESULT_CLOSE), call_id or "")


def _april_part(part: Any, where: str) -> str:
    kind = _block_type(part, where)
    if kind != "text":
        return f"[Unsupported {kind}]"
    text = part.get("text")
    if not isinstance(text, str):
        _refuse(f"{where}.text", f"is {_kind(text)}, but only text can be rendered", "Send a string.")
    return text


def _block_type(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        _refuse(where, f"is {_kind(block)} without a type", 'Send {"type": "text", "text": "..."}.')
    return kind


def _read_task(message: Mapping[str, Any], where: str) -> str | None:
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in markers.TASK_MARKERS):
        _refuse(
            f"{where}.task",
            f"is {task!r}, for which the model has no token",
            f"Use one of {', '.join(markers.TASK_MARKERS)}, or leave it out.",
        )
    return task


def read_tools(tools: Any, where: str) -> list[Any]:
    """Return the `function` objects of a tools list; None and an empty list both mean no tools."""
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)):
        _refuse(where, f"is {_kind(tools)}, not a list of tools", "Send a list; leave it out for no tools.")
    functions = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            _refuse(
                f"{where}[{i}].function",
                "is missing, and the model is shown nothing else of a tool",
                'Send {"type": "function", "function": {"name": ..., "parameters": ...}}.',
            )
        if not isinstance(function.get("name"), str) or not function["name"]:
            _refuse(
                f"{where}[{i}].function.name",
                "is missing, so the model could not call the tool",
                "Give it a name.",
            )
        functions.append(function)
    return functions


def _read_calls(calls: Any, where: str) -> list[Call]:
    if calls is None:
        return []
    if not isinstance(calls, (list, tuple)):
        _refuse(where, f"is {_kind(calls)}, not a list of calls", "Send a list; leave it out for no calls.")
    return [_read_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _refuse(
            f"{where}.function.name",
            "is missing, so the call cannot be rendered",
            'Send {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{}"}}.',
        )
    if "arguments" not in function:
        _refuse(f"{where}.function.arguments", "is missing, so the call cannot be rendered", 'Send "{}" for none.')
    call_id = call.get("id")
    if call_id is not None and not isinstance(call_id, str):
        _refuse(f"{where}.id", f"is {_kind(call_id)}, so no tool result can name it", "Send the id as a string.")
    sampled = call.get("sampled_parameters")  # its text as the model wrote it (`Finished.sampled`)
    given = call_parameters(function["arguments"], f"{where}.function.arguments") if sampled is None else tuple(sampled)
    return Call(call_id or "", function["name"], given)


def _kind(value: Any) -> str:
    """Name a JSON kind for an error text."""
    if value is None:
        return "null"
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _refuse(where: str, what: str, fix: str) -> NoReturn:
    raise RequestError(f"{where} {what}. {fix}", param=where)
