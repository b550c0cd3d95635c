"""Every reason the referee can give, closed: a code, the check it belongs to, whether it is hard, and an example.

`docs/referee.md` lists them from here. A hard reason rejects an answer unless it was repaired; a soft one is only told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Check = Literal[
    "schema", "tool", "format", "copy", "arith", "citations", "claims", "code", "abstain", "done", "thread", "transport"
]
"""What looks at an answer. `transport` is the connection to the model, `thread` the reasoning of earlier turns."""


@dataclass(frozen=True)
class Reason:
    """hard: whether it rejects the answer. says: what it means. example: an answer that has it."""

    code: str
    check: Check
    hard: bool
    says: str
    example: str


REASONS: Final = (
    Reason("schema_not_json", "schema", True, "JSON was asked for and the content is none.", "`Sure! {a: ...`"),
    Reason("schema_mismatch", "schema", True, "The content breaks the schema asked for.", '`{"n": "x"}`, n a number'),
    Reason("schema_unusable", "schema", False, "The request's schema is none; nothing was held to it.", "a bad $ref"),
    Reason("tool_unknown", "tool", True, "A call names no tool of the request.", "`get_wether`"),
    Reason("name_alias", "tool", True, "A tool under another spelling of its name.", "`functions.getWeather`"),
    Reason("call_malformed", "tool", True, "A call without a function or a name.", '`{"id": "c1"}`'),
    Reason("arguments_not_json", "tool", True, "Arguments that are no JSON.", "`{'city': 'Oslo',}`"),
    Reason("arguments_not_object", "tool", True, "Arguments that are no object.", '`["Oslo"]`'),
    Reason("arguments_wrapped", "tool", True, "Arguments inside another object.", '`{"arguments": {...}}`'),
    Reason("arguments_stringified", "tool", True, "JSON inside a JSON string.", '`"{\\"city\\": \\"Oslo\\"}"`'),
    Reason("required_missing", "tool", True, "A required argument is missing.", "`{}`, city required"),
    Reason("type_wrong", "tool", True, "An argument of another type.", '`{"days": "3"}`'),
    Reason("enum_wrong", "tool", True, "A value that is not among those allowed.", '`"Kelvin"` of C and F'),
    Reason("range_wrong", "tool", True, "A number, text or list outside its bounds.", "`days: 99`, at most 14"),
    Reason("extra_key", "tool", True, "An argument the tool does not have.", '`{"city": ..., "mood": ...}`'),
    Reason("key_alias", "tool", True, "An argument under another spelling of its name.", "`userId` for `user_id`"),
    Reason("duplicate_key", "tool", True, "One argument twice, with different values.", '`{"a": 1, "a": 2}`'),
    Reason("arguments_invalid", "tool", True, "Arguments that break another rule of the schema.", "a pattern, oneOf"),
    Reason("call_id_missing", "tool", True, "A call without an id.", '`"id": null`'),
    Reason("call_id_duplicate", "tool", True, "Two calls with one id.", "`c1`, `c1`"),
    Reason("call_repeated", "tool", False, "The same call twice in one answer.", "two equal `read_file`"),
    Reason("calls_parallel", "tool", True, "Several calls where one was allowed.", "parallel_tool_calls false"),
    Reason("call_missing", "tool", True, "tool_choice asks for a call and there is none.", "`required`, a text"),
    Reason("call_unwanted", "tool", True, "A call where none, or another, was allowed.", "tool_choice `none`"),
    Reason("side_effect_forbidden", "tool", True, "A call that the policy forbids.", "`delete_*`"),
    Reason("tool_schema_unusable", "tool", False, "A tool's schema is none; calls were not held to it.", "a bad $ref"),
    Reason("finish_missing", "format", True, "The answer does not say why it ended.", '`"finish_reason": null`'),
    Reason("finish_inconsistent", "format", True, "It ended otherwise than it says.", "calls, and `stop`"),
    Reason("truncated", "format", False, "Cut off at the token limit; hard with calls or JSON.", "`length`"),
    Reason("truncated_call", "format", True, "A call or JSON cut off at the token limit.", "`length`, `{\"a`"),
    Reason("filtered", "format", False, "The upstream filtered the answer.", "`content_filter`"),
    Reason("thinking_unclosed", "format", True, "Reasoning that never closes, in the content.", "`<think>Well,`"),
    Reason("thinking_in_content", "format", True, "Reasoning in the content.", "`<think>..</think>4`"),
    Reason("control_token", "format", True, "A control token in the content.", "`4<｜end▁of▁sentence｜>`"),
    Reason("calls_in_content", "format", True, "Calls written as text.", "DSML, `<tool_call>`"),
    Reason("empty_answer", "format", True, "No content and no call, perhaps after full reasoning.", '`""`'),
    Reason("answer_malformed", "format", True, "No chat completion at all.", "no choices"),
    Reason("not_judged", "format", False, "A part of the answer that no check here reads.", "audio, free text"),
    Reason("copy_altered", "copy", True, "An identifier almost as in the context.", "`a3f9c1`"),
    Reason("copy_unknown", "copy", True, "An identifier nobody makes up that the context does not have.", "a UUID"),
    Reason("copy_new", "copy", False, "An identifier that the context does not have.", "`notes-2.md`"),
    Reason("arith_wrong", "arith", True, "A closed expression with another value.", "`17 * 3 = 41`"),
    Reason("sum_wrong", "arith", True, "A table's total that is not its sum.", "1, 2, Total 4"),
    Reason("quote_not_found", "citations", False, "A quotation that the evidence does not have.", '"words" [doc-1]'),
    Reason("citation_missing", "citations", False, "A statement without the citation asked for.", "`It sings.`"),
    Reason("source_unknown", "citations", False, "A citation of no evidence given.", "`[doc-9]`"),
    Reason("claim_contradicted", "claims", True, "The sources say otherwise; confirmed.", "1905, the source 1904"),
    Reason("claim_not_found", "claims", False, "The sources do not say it; confirmed.", "a job nobody mentions"),
    Reason("claim_suspected", "claims", False, "Words speak against it; nobody judged it.", "an unknown name"),
    Reason("judge_failed", "claims", False, "Claims that nobody judged.", "HTTP 500, no budget"),
    Reason("code_broken", "code", True, "Code that does not compile.", "`def f(:`"),
    Reason("code_fails", "code", True, "Code that fails a test or example given.", "`f(2)` gave 5, not 4"),
    Reason("code_not_run", "code", False, "Code that was not run, and why.", "no sandbox, Rust"),
    Reason("low_confidence", "abstain", False, "The answer is likelier wrong than the profile allows.", "p = 0.2"),
    Reason("done_without_evidence", "done", True, "Done is claimed, and nothing shows it.", "no test run"),
    Reason("reasoning_restored", "thread", False, "The client had dropped reasoning; it was put back.", "a tool turn"),
    Reason("reasoning_missing", "thread", False, "Reasoning that is gone; thought again without.", "a new server"),
    Reason("check_failed", "transport", True, "A check itself failed, which is a mistake of ours.", "an exception"),
    Reason("upstream_failed", "transport", True, "The upstream failed twice.", "HTTP 500"),
)  # fmt: skip
BY_CODE: Final = {reason.code: reason for reason in REASONS}

Status = Literal["fail", "repaired", "warn"]


@dataclass(frozen=True)
class Finding:
    """One thing a check found.

    says: for people and for the model that is asked again. call: which call it is in, from 0. path: where in its
    arguments. span: characters of the content, or of the argument. candidate: what was probably meant. evidence_ids:
    of the evidence looked at. hard: as the reason's, where the profile does not say otherwise.
    """

    code: str
    says: str
    status: Status = "fail"
    call: int | None = None
    path: str | None = None
    span: tuple[int, int] | None = None
    candidate: str | None = None
    evidence_ids: tuple[str, ...] = ()
    hard: bool | None = None

    @property
    def check(self) -> Check:
        return BY_CODE[self.code].check

    @property
    def rejects(self) -> bool:
        """Whether an answer with it is rejected."""
        is_hard = BY_CODE[self.code].hard if self.hard is None else self.hard
        return self.status == "fail" and is_hard


def failed(code: str, says: str, **more: object) -> Finding:
    """A finding that stands; soft ones become warnings."""
    finding = Finding(code, says, **more)  # type: ignore[arg-type]
    return finding if finding.rejects else Finding(code, says, "warn", **more)  # type: ignore[arg-type]


def repaired(code: str, says: str, **more: object) -> Finding:
    """A finding that was cured on the spot."""
    return Finding(code, says, "repaired", **more)  # type: ignore[arg-type]
