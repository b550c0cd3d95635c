"""Code in answers: which blocks and tests are found, and what running them in a sandbox says."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sandboxes import need

from rorqual.errors import RequestError, SandboxError
from rorqual.referee import Answer, Asked, Options, Policy, Referee, options_of
from rorqual.referee.check_code import SandboxRunner, check_code
from rorqual.referee.code_blocks import python_blocks, wanted_of


def block(code: str, language: str = "python") -> str:
    return f"Here:\n```{language}\n{code}\n```\n"


DOUBLE = block("def f(x):\n    return x * 2")
TRIPLE = block("def f(x):\n    return x * 3")


def asking(question: str) -> Asked:
    return Asked({"model": "m", "messages": [{"role": "user", "content": question}]})


@pytest.fixture(scope="module")
def runner() -> Iterator[SandboxRunner]:
    need(("function", "zygote"))
    made = SandboxRunner()
    yield made
    made.close()


# ---------------------------------------------------------------- reading


def test_blocks_of_python():
    text = DOUBLE + block("ls", "sh") + block(">>> f(2)\n4") + block("    x = 1") + block("def g():\n    ...")
    blocks, others = python_blocks(text)
    assert [one.has_gaps for one in blocks] == [False, True, True] and others == ["sh"]
    assert text[slice(*blocks[0].span)] == blocks[0].code == "def f(x):\n    return x * 2\n"


@pytest.mark.parametrize(
    "question, call, value",
    [
        ("Write f so that f(2) -> 4.", "f(2)", 4),
        ("`f([1, 2])` should return `[2, 4]`, please", "f([1, 2])", [2, 4]),
        ('E.g. f("a") == "aa", f is yours', "f('a')", "aa"),
        ("f(2.5) returns 5.", "f(2.5)", 5),
        ("```\n>>> f(3)\n6\n```", "f(3)", 6),
        ("f(1, k=(2, 3)) gives {'a': 1} always", "f(1, k=(2, 3))", {"a": 1}),
    ],
)
def test_examples_in_words(question: str, call: str, value: Any):
    (example,) = wanted_of(question, None).examples
    assert (example.call, example.value) == (call, value)


@pytest.mark.parametrize("question", ["f(x) -> y", "print(open('a')) == 3", "f(2) is nice", "see f(2).", "x.f(2) == 3"])
def test_no_examples(question: str):
    assert not wanted_of(question, None).examples


def test_wanted_of_the_question_and_the_request():
    found = wanted_of("Make these pass:\n```python\nassert f(1) == 2\n```\nassert f(2) == 4\n", "assert f(3) == 6")
    assert found.sources == ("assert f(3) == 6", "assert f(1) == 2\n", "assert f(2) == 4") and not found.examples


# ---------------------------------------------------------------- running

CASES: list[tuple[str, str, str | None, str | None]] = [
    ("Write f.", DOUBLE, None, None),
    ("Write f with f(2) -> 4 and f([1]) == [1, 1].", DOUBLE, None, None),
    ("Write f with f(2) -> 5.", DOUBLE, "code_fails", "`f(2)` gives 4, not 5"),
    ("```\n>>> f(3)\n6\n```", TRIPLE, "code_fails", "gives 9, not 6"),
    ("```python\nassert f(1) == 3\nassert f(3) == 6\n```", TRIPLE, "code_fails", "at `assert f(3) == 6`"),
    ("Write f.", block("def f(x:\n    return x"), "code_broken", "SyntaxError"),
    ("f(1) -> 1", block("def f(x):\n    return 1 / 0"), "code_fails", "ZeroDivisionError"),
    ("f(1) -> 1", block("import sys\ndef f(x):\n    sys.exit(0)"), "code_fails", "SystemExit"),
    ("f(1) -> 1", block("import os\ndef f(x):\n    os._exit(0)"), "code_fails", "ended the process"),
    ("f(1) -> 1", block("import not_there\ndef f(x):\n    return x"), "code_not_run", "not_there"),
    ("f(1) -> True", block("def f(x):\n    return 1"), "code_fails", "not True"),
    ("f(1) -> 1", block("class No:\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return No()"),
     "code_fails", "not 1"),
    ("Write f.", block("raise ValueError"), None, None),  # nothing asks for it to be run
]  # fmt: skip


@pytest.mark.parametrize("question, answer, code, says", CASES)
def test_code_is_held_to_its_tests(
    runner: SandboxRunner, question: str, answer: str, code: str | None, says: str | None
):
    found = check_code(asking(question), Answer(answer, finish="stop"), None, runner)
    assert [one.code for one in found] == ([] if code is None else [code])
    assert says is None or says in found[0].says


def test_code_that_does_not_end(runner: SandboxRunner):
    answer = Answer(block("def f(x):\n    while True:\n        pass"), finish="stop")
    (found,) = check_code(asking("Write f."), answer, "assert f(1)", runner, run_s=0.2)
    assert found.code == "code_fails" and "longer than 0.2 s" in found.says


def test_it_is_asked_again_with_the_failing_case_and_given_up_in_the_end(runner: SandboxRunner):
    async def ask(body: Any) -> Answer:
        asked.append(body["messages"][-1]["content"])
        return Answer(answers.pop(0), finish="stop")

    options = Options("enforce", Policy(), ("code",), tests="assert f(2) == 4", runs_code=True)
    for given, word in (([DOUBLE], "repaired"), ([TRIPLE + " ", TRIPLE + "  "], "abstained")):
        asked, answers = list[str](), list(given)
        referee = Referee(code=runner)
        verdict = asyncio.run(referee.judge_answer(asking("Write f."), Answer(TRIPLE, finish="stop"), options, ask))
        assert verdict.word == word and "assert f(2) == 4" in asked[0]
        assert [one["rule"] for one in verdict.actions][:1] == [6]


# ---------------------------------------------------------------- without one


class Absent:
    def run(self, *_: Any) -> Any:
        raise SandboxError("there is no sandbox here")


def test_code_that_could_not_be_run_is_told_and_rejects_nothing():
    options = Options("enforce", Policy(), ("code",), runs_code=True)
    verdict = asyncio.run(
        Referee(code=Absent()).judge_answer(asking("f(1) -> 1"), Answer(DOUBLE, finish="stop"), options)
    )
    assert verdict.word == "pass" and [one.code for one in verdict.findings] == ["code_not_run"]


def test_a_server_that_runs_no_code_refuses_the_check():
    with pytest.raises(RequestError, match="--run-code"):
        options_of({"checks": ["code"]}, Options("annotate", Policy()))
    runs = Options("annotate", Policy(), runs_code=True)
    assert options_of({"checks": ["code"], "tests": "assert f(1)"}, runs).tests == "assert f(1)"
    with pytest.raises(RequestError, match=r"referee\.tests"):
        options_of({"checks": ["copy"], "tests": "assert f(1)"}, runs)
