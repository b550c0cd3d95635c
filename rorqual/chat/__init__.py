"""Chat messages to prompt text and generated text back to messages, in the format DeepSeek-V4 was trained on.

Writing: `encode_messages` (or `render_messages`, which also tells markers from text), `fim_prompt`.
Reading: `parse_completion` (strict or tolerant) and `StreamParser`. Sampling: `suppressed_ids`. Imports no torch.
"""

from rorqual.chat.call_grammar import reply_grammar
from rorqual.chat.calls import make_call_id
from rorqual.chat.effort import resolve_effort
from rorqual.chat.encode import encode_messages, render_messages
from rorqual.chat.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from rorqual.chat.fim import fim_prompt, render_fim
from rorqual.chat.markers import REVISIONS, ROLES, THINKING_MODES
from rorqual.chat.parse import parse_completion
from rorqual.chat.prompt import RenderedPrompt
from rorqual.chat.reply_ids import suppressed_ids, suppressed_ids_after
from rorqual.chat.stream import StreamParser
from rorqual.chat.strict import check_strict_schema

__all__ = [
    "REVISIONS",
    "ROLES",
    "THINKING_MODES",
    "ContentDelta",
    "Event",
    "Finished",
    "ReasoningDelta",
    "RenderedPrompt",
    "StreamParser",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "check_strict_schema",
    "encode_messages",
    "fim_prompt",
    "make_call_id",
    "parse_completion",
    "render_fim",
    "render_messages",
    "reply_grammar",
    "resolve_effort",
    "suppressed_ids",
    "suppressed_ids_after",
]
