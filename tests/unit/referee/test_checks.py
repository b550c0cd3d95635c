"""The other checks: format, JSON content, copies, arithmetic, citations, completion claims."""

import asyncio
import json
import random
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rorqual.referee import Answer, Asked, Call, Evidence, Options, Policy
from rorqual.referee.audit import without_secrets
from rorqual.referee.check import BIG, Checked, check_answer, check_beside
from rorqual.referee.check_arith import evaluate
from rorqual.referee.check_copy import check_copy
from rorqual.referee.identifiers import IDENTIFIER, Identifiers, _siblings, edit_distance
from rorqual.referee.policy import PROFILES
from rorqual.referee.reasons import BY_CODE, REASONS

TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]
UUID = "3f2b8c1e-90ab-4cde-8f01-23456789abcd"


def checked(
    content: str | None = None, *, asked: str = "Hi", finish: str | None = "stop", calls: Any = (),
    profile: str = "assistant", checks: Any = None, reasoning: str | None = None, **request: Any,
) -> Checked:  # fmt: skip
    body = {"messages": [{"role": "user", "content": asked}], "tools": TOOLS, **request}
    answer = Answer(content, reasoning, tuple(calls), finish if not calls else "tool_calls")
    options = Options("enforce", Policy(PROFILES[profile]))
    if checks:
        options = Options("enforce", Policy(PROFILES[profile]), tuple(checks), evidence=request.get("evidence", ()))
    return check_answer(Asked(body), answer, options)


def reading(path: str) -> tuple[Call, ...]:
    return (Call("c", "read", json.dumps({"path": path})),)


# ---------------------------------------------------------------- format


def test_reasons_are_a_closed_list_with_examples():
    assert len(BY_CODE) == len(REASONS)
    assert all(reason.says.endswith(".") and reason.example for reason in REASONS)


def test_reasoning_in_the_content_is_moved_out():
    for content in ("<think>Well.</think>\n4", "Well.</think>4"):
        one = checked(content)
        assert (one.answer.content, one.answer.reasoning) == ("4", "Well.") and not one.standing
    assert checked("<think>Well, it is").standing == ("thinking_unclosed",)
    assert not checked("<think>", asked="How do I write a <think> tag?").standing


def test_control_tokens():
    assert checked("4<｜end▁of▁sentence｜>").answer.content == "4"
    assert checked("4<|im_end|>\n").answer.content == "4"
    assert checked("4<｜User｜>And 5?").standing == ("control_token",)
    assert not checked("It is <｜User｜>.", asked="What is <｜User｜>?").findings
    assert not checked("Write `<|im_end|>` behind each turn.").findings


@pytest.mark.parametrize("finish, standing", [("stop", ()), ("length", ()), (None, ("finish_missing",)),
                                              ("content_filter", ()), ("what", ("finish_inconsistent",))])  # fmt: skip
def test_finish_reasons(finish: str | None, standing: tuple[str, ...]):
    assert checked("Yes.", finish=finish).standing == standing


def test_an_answer_without_an_answer():
    assert checked("", reasoning="I think that").standing == ("empty_answer",)
    assert checked(None).standing == ("empty_answer",)


# ---------------------------------------------------------------- JSON

FORM = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"n": {"type": "integer"}},
                                                          "required": ["n"]}}}  # fmt: skip


def test_json_content():
    assert checked('{"n": 1, "more": 2}', response_format=FORM).answer.content == '{"n": 1, "more": 2}'
    assert checked('```json\n{"n": "1"}\n```', response_format=FORM).answer.content == '{"n": 1}'
    assert checked('{"m": 1}', response_format=FORM).standing == ("schema_mismatch",)
    assert checked("One.", response_format=FORM).standing == ("schema_not_json",)
    assert checked("[1]", response_format={"type": "json_object"}).standing == ("schema_mismatch",)
    assert "truncated_call" in checked('{"n": 1', response_format=FORM, finish="length").standing
    unusable = {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}
    assert [one.code for one in checked("{}", response_format=unusable).findings] == ["schema_unusable"]


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "context, path, code",
    [
        ("see src/server/gateway.py", "src/server/gateway.py", None),
        ("see src/server/gateway.py", "src/server/gatewey.py", "copy_altered"),
        ("see src/server/gateway.py", "src/server/gatewaay.py", "copy_altered"),
        ("see chapter1.md", "chapter2.md", "copy_new"),
        ("see report.md", "report.html", "copy_new"),
        ("see nothing", "notes/new-file.md", "copy_new"),
        (f"order {UUID}", UUID, None),
        (f"order {UUID}", UUID.replace("8c1e", "8c7e"), "copy_altered"),
        ("no order", UUID, "copy_unknown"),
        ("commit 9fceb02d0ae598e95dc970b7", "9fceb02d0ae598e95dc970b8", "copy_altered"),
        ("account 80341255", "80341265", "copy_altered"),
        ("account 80341255", "80341256", "copy_new"),
        ("account 4711", "2026", None),
        ("on 2026-11-30", "2026-12-01", None),
        ("see nothing", "the weather of Oslo", None),
    ],
)
def test_identifiers_in_arguments(context: str, path: str, code: str | None):
    one = checked(asked=context, calls=reading(path))
    assert [found.code for found in one.findings] == ([] if code is None else [code])
    assert bool(one.standing) == (code in ("copy_altered", "copy_unknown"))
    if code == "copy_altered":
        assert one.findings[0].candidate in context


def test_a_strict_profile_takes_no_new_identifier_and_prose_is_only_told():
    assert checked(asked="none", calls=reading("a/b.md"), profile="regulated").standing == ("copy_unknown",)
    told = checked("It is in src/server/gatewey.py.", asked="see src/server/gateway.py")
    assert [(one.code, one.status) for one in told.findings] == [("copy_altered", "warn")]


def test_edit_distance_is_levenshteins():
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in [("abc", "abd"), ("abcd", "bcd"), ("ab", "ba"), ("kitten", "sittin"), ("", "xy"), ("same", "same")]:
        assert min(slow(a, b), 3) == min(edit_distance(a, b, 2), 3)


# ---------------------------------------------------------------- arithmetic

RIGHT = [
    "17 * 3 = 51", "So 2 + 3 = 5.", "1/3 = 0.33", "2/3 = 0.67", "2/3 = 0.66", "0.1 + 0.2 = 0.30000000000000004",
    "1,200 + 34 = 1,234", "2^10 = 1024", "(2 + 3) × 4 = 20", "7 / 2 = 3.5", "10 - 4 - 3 = 3", "2 + 3 = 4 + 1 = 5",
    "100 / 7 ≈ 14.3", "7 / 2 = 4", "-3 + 5 = 2",
]  # fmt: skip
WRONG = [
    "17 * 3 = 41", "So 2 + 3 = 6.", "1/3 = 0.35", "1,200 + 34 = 1,254", "2^10 = 1000", "(2 + 3) × 4 = 14",
    "10 - 4 - 3 = 9", "2 + 3 = 5 + 1", "12 × 12 = 124 eggs", "The total is 250 + 125 = 385 euros.",
]  # fmt: skip
SILENT = [
    "x + 2 * 3 = 10", "5 + 9 = 2 (mod 12)", "In binary 1 + 1 = 10", "2 + 2 = 5 is wrong", "3 + 4 = 7x", "`1 + 1 = 3`",
    "```\na = 1 + 1 = 3\n```", "if 1 + 1 = 3", "version 1.2 = 3", "2024-01-05 = 3", "3 * 4 = 12.5%",
    "5 km + 3 km = 9 km",
    "2 + 3 = 5 million", "9^9^9^9^9 = 1", "1 / 0 = 5", "a/2 = 7", "10 % 3 = 1", "2 + 3 = 10 / 2 + y", "f(2) + 3 = 9",
    "2 + 3 != 6", "1/2/2024 = 3", "007 + 1 = 9", "x 5 + 3 = 9", "sqrt(16) + 1 = 6",
]  # fmt: skip


@pytest.mark.parametrize("text", RIGHT + SILENT)
def test_arithmetic_that_is_right_or_none_passes(text: str):
    assert not checked(text).findings


@pytest.mark.parametrize("text", WRONG)
def test_arithmetic_that_is_wrong(text: str):
    one = checked(text)
    assert one.standing == ("arith_wrong",) and one.findings[0].candidate


def test_what_the_question_itself_says_is_not_held_against_the_answer():
    assert not checked("You wrote 2 + 2 = 5.", asked="Is 2 + 2 = 5?").findings


def test_expressions_are_exact_and_bounded():
    assert evaluate("1/3 + 1/6") == Fraction(1, 2)
    assert evaluate("2 ** 3 ** 2") == 2**9 and evaluate("-2^2") == -4 and evaluate("2^-1") == Fraction(1, 2)
    for text in ("9^99999", "1/0", "2 +", "(1", "__import__", "", "9^9^9^9"):
        assert evaluate(text) is None


def test_totals_of_tables():
    table = "| Item | Count | Price |\n|---|---|---|\n| a | 2 | 5 |\n| b | 3 | 6 |\n| Total | {} | 28 |\n"
    assert not checked(table.format(5)).findings
    assert checked(table.format(6)).standing == ("sum_wrong",)


# ---------------------------------------------------------------- citations and completion


def test_quotations():
    evidence = (Evidence("doc-1", "Whales sing for hours on end."),)
    good = '"Whales sing for   hours" [doc-1] and more [doc-1].'
    for content, code in ((good, None), ('"Whales sing for days" [doc-1].', "quote_not_found"),
                          ("They sing [doc-9].", "source_unknown")):  # fmt: skip
        for profile in ("assistant", "regulated"):
            one = check_answer(
                Asked({"messages": []}), Answer(content, finish="stop"),
                Options("enforce", Policy(PROFILES[profile]), ("citations",), evidence=evidence),
            )  # fmt: skip
            assert [found.code for found in one.findings] == ([] if code is None else [code])
            assert bool(one.standing) == (code is not None and profile == "regulated")


def test_done_needs_a_check_after_the_last_edit():
    def turn(name: str, arguments: str, result: str) -> list[Any]:
        call = {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        return [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": name, "content": result}]

    edit = turn("write_file", '{"path": "a.py"}', "written")
    tests = turn("shell", '{"command": "pytest -q"}', "12 passed\nexit code 0")
    failing = turn("shell", '{"command": "pytest -q"}', "1 failed, 11 passed\nexit code 1")
    for messages, is_shown in ((edit + tests, True), (edit, False), (tests + edit, False), (edit + failing, False)):
        one = checked("The bug is fixed and all tests pass.", checks=["done"], messages=messages)
        assert bool(one.standing) != is_shown
        assert not checked("I will look at it now.", checks=["done"], messages=messages).findings


def test_the_documentation_lists_every_reason():
    page = (Path(__file__).parents[3] / "docs" / "referee.md").read_text(encoding="utf-8")
    rows = [
        f"| `{one.code}` | {one.check} | {'yes' if one.hard else 'no'} | {one.says} | {one.example} |"
        for one in REASONS
    ]
    assert [line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 6] == rows


@pytest.mark.parametrize("text", [
    "(" * 50_000, "1" * 200_000, "1,111" * 40_000, "1+" * 100_000, "1 + 1 = 3 " * 20_000, "=" * 100_000,
    "+@" * 100_000, "a/" * 100_000, "a-" * 100_000, "a." * 100_000, "://" * 50_000, "| 1 " * 50_000, "<think>" * 20_000,
    "<tool_call>" * 20_000, "```json\n" + " " * 200_000, '"' * 100_000, "[" * 100_000, "/*" * 100_000,
])  # fmt: skip
def test_texts_made_to_be_slow_are_read_in_time(text: str):
    """They would take hours if the reading were quadratic or worse."""
    checked(text, asked="whales", checks=["format", "copy", "arith", "citations", "done"])
    checked(text, response_format=FORM)
    checked(calls=(Call("c", "read", text),))
    checked(calls=(Call("c", "read", json.dumps({"path": text})),))
    without_secrets(text)


def test_identifiers_made_to_be_alike_are_told_apart():
    """Ten thousand pairs that differ at both ends: minutes, were every cell of every table filled."""
    names = [f"{'a' * 250}{3 * chr(97 + i // 26)}{3 * chr(97 + i % 26)}.md" for i in range(500)]
    asked = Asked({"messages": [{"role": "user", "content": " ".join(f"x{name}" for name in names)}]})
    found = check_copy(asked, Answer(" ".join(f"y{name}" for name in names[:20]), finish="stop"), Policy())
    assert [one.candidate for one in found] == [f"x{name}" for name in names[:20]]


@pytest.mark.parametrize("made", [[5], 5, [None, {"id": "c"}]])
def test_a_conversation_that_is_odd_fails_no_check(made: Any):
    odd = {"role": "assistant", "content": None, "tool_calls": made}
    asked = Asked({"messages": [odd, {"role": "user", "content": [{"type": "text", "text": "Is it done?"}]}]})
    found = check_answer(asked, Answer("It is done.", finish="stop"), Options("annotate", Policy(), ("done",)))
    assert "check_failed" not in {one.code for one in found.findings}


def test_the_nearest_identifier_is_that_of_comparing_all():
    draw = random.Random(7)
    names = ["".join(draw.choice("ab12") for _ in range(draw.randint(5, 14))) + f"_{i % 7}x" for i in range(300)]
    text = " ".join(names)
    known = list(dict.fromkeys(match[0] for match in IDENTIFIER.finditer(text)))
    for name in names[:60]:
        at = draw.randrange(len(name))
        word = name[:at] + draw.choice("ab12_x") + name[at + draw.randint(0, 1) :]
        if word in text or len(word) < 6 or (match := IDENTIFIER.fullmatch(word)) is None:
            continue
        kind, most = match.lastgroup or "", 2 if len(word) >= 8 else 1
        distances = {one: edit_distance(word, one, most) for one in known if not _siblings(word, one, kind)}
        found = Identifiers(text).nearest(word, kind)
        nearest = min(distances.values())
        assert found == (next(one for one in known if distances.get(one) == nearest) if nearest <= most else None)


def test_long_numbers_beside_other_identifiers_fail_no_check():
    found = checked(asked="order A80341255", calls=reading("80341256"))
    assert "check_failed" not in {one.code for one in found.findings}


def test_large_texts_are_checked_beside_the_event_loop():
    async def both() -> tuple[set[str], Checked]:
        threads = set[str]()
        asked = Asked({"messages": [{"role": "user", "content": "whales " * BIG}]})
        asked.__dict__["context"] = Noting(threads, asked.context)
        return threads, await check_beside(asked, Answer("see a1b2-c3d4", finish="stop"), Options("annotate", Policy()))

    class Noting(str):
        def __new__(cls, threads: set[str], text: str) -> "Noting":
            made = super().__new__(cls, text)
            made.threads = threads  # type: ignore[attr-defined]
            return made

        def __contains__(self, word: object) -> bool:
            self.threads.add(threading.current_thread().name)  # type: ignore[attr-defined]
            return super().__contains__(word)  # type: ignore[operator]

    threads, found = asyncio.run(both())
    assert not found.standing and threads and threading.current_thread().name not in threads
