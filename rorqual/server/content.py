"""The text of a message's content, which clients send as a string or as a list of parts.

Besides `text`, parts of other dialects whose meaning is clear are read: `input_text`, `output_text`, a `refusal`, and
reasoning that a client keeps among the parts instead of beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rorqual.errors import RequestError

_TEXT_OF = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_OF = {"reasoning": "text", "reasoning_text": "text", "thinking": "thinking"}
_IMAGES = ("image_url", "image", "input_image")
_NO_EFFECT = {"type", "cache_control", "annotations", "citations", "logprobs", "signature", "id", "index"}


@dataclass(frozen=True)
class Content:
    """A message's text, and the reasoning found among its parts; None where there is none."""

    text: str | None
    reasoning: str | None = None


def read_content(content: Any, where: str, *, is_assistant: bool = False) -> Content:  # Any: whatever JSON holds
    """Raises: RequestError naming the part that cannot be read."""
    if content is None or isinstance(content, str):
        return Content(content)
    if not isinstance(content, list):
        raise RequestError(
            f"{where}: invalid type: expected a string or a list of text parts. Send the text as a string.",
            param=where,
        )
    texts, reasoning = [], []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if is_assistant and kind in _REASONING_OF:
            reasoning.append(_part_text(part, _REASONING_OF[kind], f"{where}[{i}]"))
        else:
            texts.append(_part_text(part, _TEXT_OF.get(str(kind)), f"{where}[{i}]"))
    return Content("\n\n".join(texts), "".join(reasoning) if reasoning else None)


def _part_text(part: Any, key: str | None, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _IMAGES:
        raise RequestError("This model does not support image. Send text only.", param=where)
    if key is None or not isinstance(part.get(key), str) or not set(part) <= {key, *_NO_EFFECT}:
        raise RequestError(
            f'{where} is not a text part. Send {{"type": "text", "text": "..."}}, or one string.', param=where
        )
    return str(part[key])
