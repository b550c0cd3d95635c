"""Chat messages to training pieces: the rendered prompt text with the assistant's own words marked as loss.

The text is exactly what `rorqual.chat.encode_messages` renders. Left out: escaping; markers inside a
user's text act as markers here, as they do in DeepSeek's encoder.
"""

import re
from typing import Any

from rorqual.tokenizer import ASSISTANT, END_THINK, EOS, THINK

# The token after the assistant marker is part of the prompt: it opens reasoning or skips it.
_TURN = re.compile(f"{re.escape(ASSISTANT)}(?:{THINK}|{END_THINK})?(.*?(?:{re.escape(EOS)}|$))", re.DOTALL)


def pieces_of_rendered(text: str) -> tuple[tuple[str, bool], ...]:
    """Split rendered chat text into `(text, is_loss)`: what the assistant wrote, EOS included, is loss."""
    pieces: list[tuple[str, bool]] = []
    position = 0
    for match in _TURN.finditer(text):
        pieces.append((text[position : match.start(1)], False))
        pieces.append((match.group(1), True))
        position = match.end(1)
    if position < len(text):
        pieces.append((text[position:], False))
    return tuple(pieces)


def render_conversation(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> tuple[tuple[str, bool], ...]:
    """Pieces of one conversation, in thinking mode when any assistant message carries `reasoning_content`."""
    from rorqual import chat

    has_reasoning = any(m.get("reasoning_content") for m in messages)
    text = chat.encode_messages(messages, tools=tools, thinking_mode="thinking" if has_reasoning else "chat")
    return pieces_of_rendered(text)
