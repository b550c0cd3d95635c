"""Which token ids a model may not choose: the one rule for chat, fill-in-the-middle and plain completion.

A control token that a model samples by chance would show up as its name in the middle of an answer. So all are
ruled out except the end token and, where the prompt leaves something for them to do, `</think>` and `｜DSML｜`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rorqual.chat.markers import DSML, THINK_END, THINK_START

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer


def suppressed_ids(tokenizer: Tokenizer, *, thinking: bool = False, tools: bool = False) -> tuple[int, ...]:
    """Ids for `SamplingParams.suppress_token_ids`, ascending.

    thinking: the prompt ends inside the reasoning, which `</think>` closes. tools: it shows tools to call.
    """
    allowed = {tokenizer.eos_token_id}
    allowed |= {tokenizer.token_id(THINK_END)} if thinking else set()
    allowed |= {tokenizer.token_id(DSML)} if tools else set()
    return tuple(sorted(tokenizer.control_token_ids - allowed))


def suppressed_ids_after(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[int, ...]:
    """The same for a raw prompt, which may be in the chat format: its own control tokens tell what it opens."""
    think, end = tokenizer.token_id(THINK_START), tokenizer.token_id(THINK_END)
    last = next((token for token in reversed(tokens) if token in (think, end)), None)
    return suppressed_ids(tokenizer, thinking=last == think, tools=tokenizer.token_id(DSML) in tokens)
