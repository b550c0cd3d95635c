"""Format reward: the answer is one that the chat format's strict parser takes, and it ends by itself.

Source: R1's format reward, with V4's own format as the rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.chat import parse_completion
from rorqual.chat.markers import EOS, THINK_END
from rorqual.errors import RequestError
from rorqual.posttrain.rewards.base import Answer, Score


class Form:
    """1 for a whole, well-formed message with something in it, 0 otherwise.

    In thinking mode that is some reasoning, `</think>` once, then content or calls; in non-thinking mode no think tag.
    """

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self._score(answer) for answer in answers]

    @staticmethod
    def _score(answer: Answer) -> Score:
        if answer.finish != "stop":
            return Score(0.0, note="cut off at the window")
        mode = answer.item.thinking_mode
        text = answer.text if answer.text.endswith(EOS) else answer.text + EOS
        if text.count(THINK_END) != (mode == "thinking"):
            return Score(0.0, note=f"{text.count(THINK_END)} closing think tags in {mode} mode")
        try:
            message = parse_completion(text, thinking_mode=mode)
        except RequestError as error:
            return Score(0.0, note=str(error))
        is_empty = not message["content"].strip() and not message["tool_calls"]
        if is_empty or (mode == "thinking" and not message["reasoning_content"].strip()):
            return Score(0.0, note="says nothing")
        return Score(1.0)
