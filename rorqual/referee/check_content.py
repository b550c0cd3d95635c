"""The content where JSON was asked for, and quotations of the evidence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rorqual.errors import RequestError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.json_text import NotJson, dump, read_leniently, read_strictly
from rorqual.referee.policy import Evidence, Policy
from rorqual.referee.reasons import Finding, failed, repaired
from rorqual.referee.schemas import fit, schema_of, violations

_CITED = re.compile(r'(?:(?:"([^"\n]{8,400})"|“([^”\n]{8,400})”)\s{0,4})?\[([A-Za-z0-9][\w.:-]{0,63})\]')


def check_schema(asked: Asked, answer: Answer) -> tuple[Answer, list[Finding]]:
    """The content as the JSON that `response_format` asks for, repaired where it has one plain reading."""
    wanted, source = asked.schema
    if not wanted or answer.calls or answer.refusal:
        return answer, []
    text, found = answer.content or "", list[Finding]()
    try:
        value, notes = read_strictly(text), list[str]()
    except NotJson as strict:
        try:
            value, notes = read_leniently(text)
        except NotJson:
            return answer, [failed("schema_not_json", f"the content is no JSON ({strict}); answer with JSON alone")]
    if notes and answer.finish == "length":
        return answer, [failed("schema_not_json", "the content is JSON that was cut off")]
    found += [repaired("schema_not_json", "; ".join(notes))] if notes else []
    try:
        schema = schema_of(source, "response_format.json_schema.schema", closed=False)
    except RequestError as error:
        return answer, [failed("schema_unusable", error.message)]
    new, repairs = fit(schema, value)
    if not schema.accepts(new):
        words = [one.says for one in violations(schema, value, label="the content")]
        return answer, [failed("schema_mismatch", "; ".join(words[:8]))]
    found += [repaired("schema_mismatch", one.says, path=one.path) for one in repairs]
    return (replace(answer, content=dump(new)) if found else answer), found


def check_citations(answer: Answer, evidence: Sequence[Evidence], policy: Policy) -> list[Finding]:
    """Citations `[id]` name given evidence, and what is quoted before one stands in it, word for word.

    Spaces and quotation marks may differ. What a cited sentence claims without quoting is not judged here.
    """
    texts = {one.id: one.text for one in evidence}
    hard = policy.profile.citations == "hard"
    found = []
    for match in _CITED.finditer(answer.content or ""):
        quote, source = match[1] or match[2], match[3]
        if source not in texts:
            if quote is None and source.isdigit():
                continue  # footnotes and list items look alike
            says = f"[{source}] is none of the sources given: {', '.join(texts)}"
            found.append(_graded("source_unknown", says, hard, match.span(3), ()))
        elif quote is not None and _words(quote) not in _words(texts[source]):
            says = f"[{source}] does not hold the words {quote[:80]!r}; quote it exactly or do not quote"
            found.append(_graded("quote_not_found", says, hard, match.span(1 if match[1] else 2), (source,)))
    return found


def _graded(code: str, says: str, hard: bool, span: tuple[int, int], ids: tuple[str, ...]) -> Finding:
    return Finding(code, says, "fail" if hard else "warn", span=span, evidence_ids=ids, hard=hard)


def _words(text: str) -> str:
    return " ".join(text.replace("“", '"').replace("”", '"').replace("’", "'").split())
