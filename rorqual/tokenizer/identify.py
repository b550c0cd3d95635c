"""Whose tokenizer a file is: DeepSeek-V4's, DeepSeek-V3's, or one of another vocabulary with V4's markers.

V3 and V4 share 128,000 entries, so ordinary text gets the same ids from both; the thinking markers moved, so a prompt
made with the wrong one is silently another prompt.
"""

from dataclasses import dataclass
from typing import Literal

from rorqual.tokenizer.special import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    MARKER_TOKENS,
    PAD,
    THINK,
    USER,
)  # fmt: skip
from rorqual.tokenizer.tokenizer import Tokenizer

V4_IDS = {
    BOS: 0,
    EOS: 1,
    PAD: 2,
    FIM_HOLE: 128800,
    FIM_BEGIN: 128801,
    FIM_END: 128802,
    USER: 128803,
    ASSISTANT: 128804,
    THINK: 128821,
    END_THINK: 128822,
    DSML: 128825,
}
"""Ids of the released V4 tokenizer that every prompt depends on."""

V4_VOCABULARY = 129280
"""Embeddings of the released V4 models (V3's have as many)."""

V3_THINK = 128798
_V3_TOOLS = "<｜tool▁calls▁begin｜>"
_V3_TOOLS_ID = 128806

Family = Literal["v4", "v3", "own", "other"]


@dataclass(frozen=True)
class Identity:
    """`family` "own": another vocabulary that has every marker of V4's prompts. `words`: what was found."""

    family: Family
    words: str


def identify(tokenizer: Tokenizer) -> Identity:
    """Whose tokenizer it is, by the ids of its markers."""
    found = {token: tokenizer.token_id(token) for token in V4_IDS if tokenizer.has_token(token)}
    if found == V4_IDS:
        return Identity("v4", f"DeepSeek-V4's: {THINK} is {V4_IDS[THINK]}, {tokenizer.vocab_size} ids")
    if found.get(THINK) == V3_THINK:
        return Identity("v3", f"DeepSeek-V3's: {THINK} is {V3_THINK}, where V4 has it at {V4_IDS[THINK]}")
    has_v3_tools = tokenizer.has_token(_V3_TOOLS) and tokenizer.token_id(_V3_TOOLS) == _V3_TOOLS_ID
    if THINK not in found and has_v3_tools:
        return Identity("v3", f"DeepSeek-V3's of before the thinking models: it has no {THINK}")
    absent = [token for token in MARKER_TOKENS if not tokenizer.has_token(token)]
    if not absent:
        return Identity("own", f"another vocabulary with V4's markers, {tokenizer.vocab_size} ids")
    return Identity("other", f"no V4 tokenizer: {', '.join(absent[:3])} and {max(0, len(absent) - 3)} more are missing")
