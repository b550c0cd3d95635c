"""The content where JSON was asked for, and quotations of the evidence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from rorqual.errors import RequestError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.claims import split_claims, without_code
from rorqual.referee.json_text import NotJson, dump, read_leniently, read_strictly
from rorqual.referee.policy import Evidence, Policy
from rorqual.referee.reasons import Finding, failed, repaired
from rorqual.referee.schemas import fit, schema_of, violations
from rorqual.referee.sources import sources_of

_MARKS = re.compile(r'"(?P<one>[^"\n]{8,400})"|“(?P<two>[^”\n]{8,400})”|\[(?P<id>[A-Za-z0-9][\w.:-]{0,63})\](?!\()')
_WANTS = re.compile(
    r"(?i)\[source\]|\[id\]|\bcit(?:e|es|ing|ations?)\b|\bwith (?:its |the |a )?(?:sources?|references?)\b"
)
_MOST = 1000


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


def check_citations(asked: Asked, answer: Answer, evidence: Sequence[Evidence], policy: Policy) -> list[Finding]:
    """Citations `[id]` name given evidence, what is quoted beside one stands in it, and none is missing.

    Spaces and quotation marks may differ. A citation is missing from a statement where the question asks for them.
    What a cited sentence claims without quoting is not judged here. Each source is read once, and at most `_MOST`
    citations are looked at.
    """
    hard = policy.profile.citations == "hard"
    sources = {one.id: one.text for one in sources_of(asked, evidence)}
    if not evidence and not sources:
        return []
    return [*_quotations(without_code(answer.content or ""), sources, hard), *_uncited(asked, answer, sources, hard)]


def _quotations(content: str, sources: Mapping[str, str], hard: bool) -> Iterator[Finding]:
    """Citations of nothing, and quotations that neither source beside them has."""
    plain = dict[str, str]()

    def holds(source: str, quote: str) -> bool:
        if source not in plain:
            plain[source] = _words(sources[source])
        return _stands_in(quote, plain[source])

    has_numbers = any(one.isdigit() for one in sources)
    marks = list(islice(_MARKS.finditer(content), _MOST))
    for place, mark in enumerate(marks):
        if mark["id"] is not None:
            if mark["id"] not in sources and (has_numbers or not mark["id"].isdigit()):
                known = ", ".join(islice(sources, 20))
                says = f"[{mark['id']}] is none of the sources given: {known}"
                yield _graded("source_unknown", says, hard, mark.span("id"), ())
            continue
        beside = [
            other["id"]
            for other, near in ((marks[place - 1], -1), (marks[(place + 1) % len(marks)], 1))
            if 0 <= place + near < len(marks) and other["id"] in sources and _touch(content, mark, other)
        ]
        quote = mark["one"] or mark["two"]
        if beside and not any(holds(source, _words(quote)) for source in beside):
            says = f"[{beside[-1]}] does not hold the words {quote[:80]!r}; quote it exactly or do not quote"
            yield _graded("quote_not_found", says, hard, mark.span("one" if mark["one"] else "two"), tuple(beside))


def _stands_in(quote: str, text: str) -> bool:
    """Whether the words stand in the text, whole: not from the middle of one, nor to it."""
    at = text.find(quote)
    while at >= 0:
        before, after = text[at - 1 : at] + quote[:1], quote[-1:] + text[at + len(quote) :][:1]
        if not (len(before) == 2 and before.isalnum()) and not (len(after) == 2 and after.isalnum()):
            return True
        at = text.find(quote, at + len(quote))
    return False


def _touch(content: str, one: re.Match[str], other: re.Match[str]) -> bool:
    first, second = sorted((one.span(), other.span()))
    return not content[first[1] : second[0]].strip(" .,;:")


def _uncited(asked: Asked, answer: Answer, sources: Mapping[str, str], hard: bool) -> Iterator[Finding]:
    """Statements without a citation, where the question asks for them."""
    if answer.calls or asked.schema[0] or not _WANTS.search(asked.question[-4000:]):
        return
    for claim in split_claims(answer.content or ""):
        if not claim.cited:
            says = f"{claim.said[:120]!r} has no citation; the sources are {', '.join(islice(sources, 20))}"
            yield _graded("citation_missing", says, hard, claim.span, ())


def _graded(code: str, says: str, hard: bool, span: tuple[int, int], ids: tuple[str, ...]) -> Finding:
    return Finding(code, says, "fail" if hard else "warn", span=span, evidence_ids=ids, hard=hard)


def _words(text: str) -> str:
    return " ".join(text.replace("“", '"').replace("”", '"').replace("’", "'").split())
