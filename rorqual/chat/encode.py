"""Messages to prompt: the text a DeepSeek-V4 checkpoint expects.

The released checkpoints come with no template; their format is defined by an encoder program. This is that
format, in both revisions for V4: `2026-04` (the April preview) and `2026-07` (V4-Flash-0731, V4-Pro-0813,
Vision-Exp). Rendering is plain concatenation: nothing is trimmed, escaped or normalised. Left out: V4.1's
format, and the bytes of images (only their placeholder is written).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.chat import markers
from rorqual.chat.conversation import drop_old_turns, last_user_index, merge_turns, order_results, place_tools
from rorqual.chat.dsml import write_calls, write_response_format, write_tools
from rorqual.chat.prompt import PromptWriter, RenderedPrompt
from rorqual.chat.turns import BLOCKS_JOIN, Turn, read_messages, read_tools
from rorqual.errors import RequestError

Message = Mapping[str, Any]


def encode_messages(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    revision: str = "2026-04",
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[Message] | None = None,
) -> str:
    """Return the prompt for `messages`, ready to be tokenised with added tokens recognised.

    messages: OpenAI-style mappings; roles system, user, assistant, tool, latest_reminder, developer. An
        assistant message with `wo_eos` leaves its turn open, so that the model continues it. A tool call with
        `sampled_parameters` (one of `Finished.sampled`) is written as it was sampled, whatever its `arguments`.
    tools: the request's tools; shown on the first message, or on an empty system message put before it.
    thinking_mode: "thinking" or "chat" (no reasoning).
    reasoning_effort: None, "high" or "max"; also "low" with revision 2026-07.
    revision: property of the checkpoint; the same effort word means other text in each.
    drop_thinking: leave out the reasoning of earlier turns; has no effect while any tools are declared.
    context: earlier messages whose text exists already; only `messages` are rendered, without BOS.

    >>> encode_messages([{"role": "user", "content": "Hi"}], thinking_mode="chat")
    '<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>'

    Raises: RequestError, naming the field and what to send instead.
    """
    return render_messages(
        messages,
        tools,
        thinking_mode,
        reasoning_effort,
        revision,
        drop_thinking,
        add_default_bos_token,
        context,
    ).text


def render_messages(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    revision: str = "2026-04",
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[Message] | None = None,
) -> RenderedPrompt:
    """Like `encode_messages`, telling the encoder's own markers from text (see `RenderedPrompt.pieces`)."""
    check_thinking_mode(thinking_mode)
    effort_text = _effort_text(reasoning_effort, revision)
    is_thinking = thinking_mode == "thinking"

    earlier = read_messages(context or [], revision, "context")
    new = read_messages(messages, revision, "messages")
    if not new:
        raise RequestError(
            "messages is empty, so there is nothing to answer. Send at least one message.", param="messages"
        )
    functions = read_tools(tools, "tools")
    if earlier:
        earlier = place_tools(earlier, functions)
    else:
        new = place_tools(new, functions)
    # The two lists are merged apart from each other, so a new tool result never joins a turn already
    # rendered.
    earlier, new = merge_turns(earlier), merge_turns(new)
    turns = earlier + new
    num_new = len(new)
    order_results(turns)

    drop = drop_thinking and not any(turn.tools for turn in turns)
    if is_thinking and drop:
        turns = drop_old_turns(turns)
        num_new = len(turns) - len(drop_old_turns(earlier))

    writer = PromptWriter()
    if add_default_bos_token and not earlier:
        writer.fixed(markers.BOS)
    renderer = _Renderer(writer, turns, is_thinking, drop)
    for i in range(len(turns) - num_new, len(turns)):
        if i == 0 and is_thinking:
            writer.fixed(effort_text)
        renderer.write_body(i)
        renderer.write_header_after(i)
    return writer.finish("messages")


class _Renderer:
    """Writes turns; holds what each needs to know of its neighbours."""

    def __init__(self, writer: PromptWriter, turns: Sequence[Turn], is_thinking: bool, drop: bool) -> None:
        self._writer = writer
        self._turns = turns
        self._is_thinking = is_thinking
        self._drop = drop
        self._last_user = last_user_index(turns)

    def write_body(self, i: int) -> None:
        turn = self._turns[i]
        start = self._writer.length
        if turn.role in ("user", "developer"):
            self._writer.fixed(markers.USER)
        elif turn.role == "latest_reminder":
            self._writer.fixed(markers.LATEST_REMINDER)
        elif turn.role == "assistant" and self._shows_reasoning(i):
            self._writer.caller(turn.reasoning)
            self._writer.fixed(markers.THINK_END)

        for j, block in enumerate(turn.blocks or ()):
            if j:
                self._writer.caller(BLOCKS_JOIN)
            self._write(block.pieces)
        self._write(turn.content)

        if turn.role in ("system", "developer"):
            self._write_extras(turn)
        elif turn.role == "assistant":
            if turn.calls:
                write_calls(self._writer, turn.calls)
            if not turn.is_open:
                self._writer.fixed(markers.EOS)
            self._writer.reply(start, turn.index, self._answers_task(i))

    def write_header_after(self, i: int) -> None:
        """Write what stands between turn `i` and the next: an assistant turn's opening, or a task's token."""
        if i + 1 < len(self._turns) and self._turns[i + 1].role not in ("assistant", "latest_reminder"):
            return
        turn = self._turns[i]
        if turn.task is not None:
            if turn.task == "action":
                self._writer.fixed(markers.ASSISTANT)
                self._writer.fixed(markers.THINK_START if self._is_thinking else markers.THINK_END)
            self._writer.fixed(markers.TASK_MARKERS[turn.task])
        elif turn.is_user:
            self._writer.fixed(markers.ASSISTANT)
            thinks = self._is_thinking and (not self._drop or i >= self._last_user)
            self._writer.fixed(markers.THINK_START if thinks else markers.THINK_END)

    def _answers_task(self, i: int) -> bool:
        return i > 0 and self._turns[i - 1].task is not None

    def _shows_reasoning(self, i: int) -> bool:
        if not self._is_thinking or self._answers_task(i):
            return False  # the reply to a task is bare
        return not self._drop or i > self._last_user

    def _write(self, pieces: Sequence[str]) -> None:
        for piece in pieces:
            self._writer.caller(piece)

    def _write_extras(self, turn: Turn) -> None:
        if turn.tools:
            self._writer.fixed("\n\n")
            write_tools(self._writer, turn.tools, turn.tools_where)
        if turn.response_format:
            self._writer.fixed("\n\n")
            write_response_format(self._writer, turn.response_format, f"{turn.where}.response_format")


def check_thinking_mode(thinking_mode: str) -> None:
    """Raise RequestError unless the mode is "chat" or "thinking"."""
    if thinking_mode not in markers.THINKING_MODES:
        raise RequestError(
            f"thinking_mode is {thinking_mode!r}, and a prompt either opens reasoning or closes it. "
            'Use "thinking" or "chat".',
            param="thinking_mode",
        )


def _effort_text(effort: str | None, revision: str) -> str:
    if not isinstance(revision, str) or revision not in markers.EFFORT_TEXTS:
        raise RequestError(
            f"revision is {revision!r}, for which no prompt format is known here. "
            f"Use the checkpoint's own: {' or '.join(markers.REVISIONS)}.",
            param="revision",
        )
    texts = markers.EFFORT_TEXTS[revision]
    if not (effort is None or isinstance(effort, str)) or effort not in texts:
        words = ", ".join(word for word in texts if word is not None)
        raise RequestError(
            f"reasoning_effort is {effort!r}, but a checkpoint of revision {revision} was trained with "
            f"{words} and none. Use one of these, or leave it out.",
            param="reasoning_effort",
        )
    return texts[effort]
