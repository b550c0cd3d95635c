"""Curing claims: the sentences at fault are asked for again, alone, or taken out; the rest of the answer stays.

Source: the specification, 8.5, rules 7 and 8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.claims import split_claims
from rorqual.referee.policy import Evidence
from rorqual.referee.reasons import Finding
from rorqual.referee.sources import SourceIndex, sources_of, words_of

REMOVED: Final = "[{count} of its statements {was} removed: the sources given do not support {them}.]"
_LINE = re.compile(r"(?m)^\W{0,4}(\d{1,3})[.):]\s*(\S.*)$")
_NOTHING = re.compile(r"(?i)^\W*(?:-|—|none|nothing|remove|delete|\(none\))\W*$")
_CLAIMS = ("claim_contradicted", "claim_not_found")


def faults_of(findings: Sequence[Finding]) -> list[Finding]:
    """The claims that reject the answer, one a sentence, in its order."""
    found = {one.span: one for one in reversed(findings) if one.rejects and one.code in _CLAIMS and one.span}
    return [found[span] for span in sorted(found)]


def ask_for_sentences(
    asked: Asked, answer: Answer, findings: Sequence[Finding], evidence: Sequence[Evidence], more: Sequence[Evidence]
) -> dict[str, Any]:
    """A request for other sentences in place of those at fault: the question, the sentences, and what sources say."""
    content = answer.content or ""
    faults = faults_of(findings)
    index = SourceIndex(sources_of(asked, evidence, more))
    lines, shown = [], dict[str, None]()
    for number, one in enumerate(faults, 1):
        assert one.span is not None
        sentence = content[one.span[0] : one.span[1]]
        lines.append(f"{number}. {sentence}\n   ({one.says})")
        for near in index.nearest(words_of(sentence), None, 5):
            shown[f"[{near.source}] {near.text}"] = None
    text = (
        f"Question: {asked.question.rpartition(chr(10) * 2)[2][-2000:]}\n\nSources:\n" + "\n".join(shown)
        + "\n\nThese sentences of an answer to it are not what the sources say:\n" + "\n".join(lines)
        + "\n\nWrite each again as the sources have it, in the same form, one numbered line each and nothing else. "
        "Where the sources do not say it, write the number and a dash."
    )  # fmt: skip
    kept = {name: value for name, value in asked.body.items() if name in _KEPT}
    return {**kept, "messages": [{"role": "user", "content": text}]}


_KEPT = frozenset(
    ("model", "temperature", "top_p", "max_tokens", "max_completion_tokens", "reasoning_effort", "thinking", "stream",
     "stream_options", "user", "user_id")
)  # fmt: skip


def with_sentences(answer: Answer, findings: Sequence[Finding], reply: Answer) -> Answer | None:
    """The answer with the sentences of the reply put in; None when the reply has not a line for each."""
    lines = {int(found[1]): found[2].strip() for found in _LINE.finditer(reply.content or "")}
    faults = faults_of(findings)
    only = (reply.content or "").strip()
    if len(faults) == 1 and not lines and "\n" not in only and len({one.span for one in split_claims(only)}) == 1:
        lines = {1: only}
    if any(number not in lines for number in range(1, len(faults) + 1)):
        return None
    content = answer.content or ""
    for number, one in reversed(list(enumerate(faults, 1))):
        assert one.span is not None
        line = "" if _NOTHING.match(lines[number]) else lines[number]
        content = _spliced(content, one.span, line)
    return replace(answer, content=content, usage=reply.usage, logprobs=None, raw={}, deltas=())


def without_claims(answer: Answer, findings: Sequence[Finding]) -> Answer | None:
    """The answer without the sentences at fault, and a line that says so; None when nothing else is left of it."""
    content = answer.content or ""
    faults = faults_of(findings)
    for one in reversed(faults):
        assert one.span is not None
        content = _spliced(content, one.span, "")
    if not words_of(content):
        return None
    was, them = ("was", "it") if len(faults) == 1 else ("were", "them")
    mark = REMOVED.format(count=len(faults), was=was, them=them)
    return replace(answer, content=f"{content.strip()}\n\n{mark}", logprobs=None, raw={}, deltas=())


def _spliced(content: str, span: tuple[int, int], text: str) -> str:
    """The content with another text at that place; an empty one takes its line or space along."""
    before, after = content[: span[0]], content[span[1] :]
    if text:
        return before + text + after
    line_start = before.rfind("\n") + 1
    if not before[line_start:].strip(" \t-*+•0123456789.)") and (not after or after.lstrip(" \t").startswith("\n")):
        return (
            before[:line_start].rstrip("\n")
            + ("\n" if before[:line_start].strip() and after.strip() else "")
            + (after.lstrip(" \t").removeprefix("\n"))
        )
    return before + after.lstrip(" \t")
