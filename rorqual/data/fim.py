"""Fill-in-the-middle: a text rewritten so that its middle is asked for after its prefix and suffix.

Layout, as V3 was trained: `<｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>middle<EOS>`.
Cuts are made between characters, not tokens, because an editor's cursor is. Four kinds of middle are
drawn: any run of characters, the rest of a line, whole lines, and the body of a function.
"""

import math
import random
import re

import numpy as np

from rorqual.data.document import Document
from rorqual.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

_DEF = re.compile(r"^([ \t]*)(?:async +def|def) .*:[ \t]*\n", re.MULTILINE)
_MAX_LINES = 12


def choose_middle(text: str, rng: random.Random) -> tuple[int, int]:
    """Start and end (in characters) of the middle to cut out of `text`; 0 <= start <= end <= len(text)."""
    kind = rng.random()
    if kind < 0.25:
        span = _function_body(text, rng)
        if span is not None:
            return span
    if kind < 0.55:
        return _whole_lines(text, rng)
    if kind < 0.8:
        start = rng.randrange(len(text) + 1)
        newline = text.find("\n", start)
        return start, newline if newline >= 0 else len(text)
    # Log-uniform: short gaps are what people ask for, long ones keep the tail trained.
    length = min(len(text), int(math.exp(rng.uniform(0, math.log(1 + 0.6 * len(text))))))
    start = rng.randrange(len(text) - length + 1)
    return start, start + length


def _whole_lines(text: str, rng: random.Random) -> tuple[int, int]:
    starts = [0, *(m.end() for m in re.finditer("\n", text))]
    if starts[-1] != len(text):
        starts.append(len(text))
    first = rng.randrange(len(starts))
    count = int(math.exp(rng.uniform(0, math.log(_MAX_LINES + 1))))
    return starts[first], starts[min(first + count, len(starts) - 1)]


def _function_body(text: str, rng: random.Random) -> tuple[int, int] | None:
    heads = list(_DEF.finditer(text))
    if not heads:
        return None
    head = rng.choice(heads)
    indent = len(head.group(1))
    end = head.end()
    for line in re.finditer(r".*(?:\n|$)", text[head.end() :]):
        content = line.group()
        if not content:
            break
        if content.strip():
            if len(content) - len(content.lstrip(" \t")) <= indent:
                break
            # Blank lines count only when code of the body follows, so `end` moves with code alone.
            end = head.end() + line.end()
    return (head.end(), end) if end > head.end() else None


def split_for_fim(text: str, target_chars: int) -> list[str]:
    """Cut `text` into parts of at most `target_chars` characters, at line starts where one is near."""
    parts = []
    start = 0
    while start < len(text):
        end = start + target_chars
        if end < len(text):
            newline = text.rfind("\n", start + target_chars // 2, end)
            end = newline + 1 if newline >= 0 else end
        parts.append(text[start:end])
        start = end
    return parts


def fim_document(text: str, tokenizer: Tokenizer, rng: random.Random) -> Document:
    """One fill-in-the-middle document of `text`. Everything is a target but BOS and the three markers.

    The markers are given by whoever asks, never written by the model, so learning to place them would be
    wasted. Raises: CheckpointError when the tokenizer lacks the markers.
    """
    start, end = choose_middle(text, rng)
    ids = [tokenizer.bos_token_id, tokenizer.token_id(FIM_BEGIN)]
    mask = [False, False]
    for part, marker in ((text[:start], FIM_HOLE), (text[end:], FIM_END), (text[start:end], None)):
        run = tokenizer.encode(part, allow_special=False)
        ids += [*run, tokenizer.token_id(marker) if marker else tokenizer.eos_token_id]
        mask += [True] * len(run) + [marker is None]
    return Document(np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_))
