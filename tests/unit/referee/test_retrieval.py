"""Texts of a folder are found by the question's words, and turn an abstention into an answer only where they say it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from claim_judge import ClaimJudge

from rorqual.errors import ConfigError
from rorqual.referee import Answer, Asked, Evidence, Options, Policy, Referee, Verdict
from rorqual.referee.judge import Judge, Tally
from rorqual.referee.retrieval import FolderRetriever, is_supported

QUESTION = "Where was Ann Vale born?"
SOURCES = (Evidence("people/a.md", "Ann Vale was born in Oslo."), Evidence("b.txt", "Bob Reed was born in Bergen."))


def asking(question: str = QUESTION) -> Asked:
    return Asked({"model": "m", "messages": [{"role": "user", "content": question}]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "people").mkdir()
    for one in SOURCES:
        (tmp_path / one.id).write_text(f"# People\n\n{one.text}\nNothing else is told here.\n", encoding="utf-8")
    return tmp_path


def test_sentences_that_have_the_questions_names(folder: Path):
    finds = FolderRetriever(folder)
    found = asyncio.run(finds.retrieve(asking(), Answer("Rome")))
    assert found == [Evidence("people/a.md", "Ann Vale was born in Oslo.")]
    assert asyncio.run(finds.retrieve(asking("Where was Cid Moor born?"), Answer("Rome"))) == []
    with pytest.raises(ConfigError, match="holds no texts"):
        FolderRetriever(folder / "people" / "none")


@pytest.mark.parametrize(
    "answer, is_fine",
    [("Oslo", True), ("She was born in Oslo.", True), ("Bergen", False), ("Not in Oslo.", False), ("", False)],
)
def test_support_by_words(answer: str, is_fine: bool):
    assert asyncio.run(is_supported(asking(), Answer(answer), SOURCES, None, Tally())) == is_fine


def test_support_by_a_judge_who_is_asked_both_ways_where_it_matters():
    for right, votes, calls in ((True, 1, 1), (True, 3, 2), (False, 3, 1)):
        judge = ClaimJudge(lambda said, right=right: "supported" if right else "not found")
        found = is_supported(asking(), Answer("Norway's capital"), SOURCES, Judge(judge, "m"), Tally(), votes=votes)
        assert asyncio.run(found) == right and len(judge.bodies) == calls


class Unsure:
    async def estimate(self, request: Asked, answer: Answer) -> float:
        return 0.1


def judged(folder: Path, second: str) -> Verdict:
    async def ask(body: Any) -> Answer:
        if "Claims:" in str(body["messages"]):
            return Answer('1 not found "Bergen"', finish="stop")
        assert "[people/a.md] Ann Vale was born in Oslo." in body["messages"][-1]["content"]
        return Answer(second, finish="stop")

    referee = Referee(confidence=Unsure(), retriever=FolderRetriever(folder))
    options = Options("enforce", Policy(), ("abstain",))
    return asyncio.run(referee.judge_answer(asking(), Answer("Rome", finish="stop"), options, ask))


def test_an_unsure_answer_is_given_when_what_was_found_says_it(folder: Path):
    given = judged(folder, "Oslo")
    assert given.answer is not None and given.answer.content == "Oslo"
    assert [one["action"] for one in given.actions] == ["RETRIEVE", "SUPPORTED", "PASS"]
    withheld = judged(folder, "Bergen")
    assert withheld.word == "abstained" and [one["action"] for one in withheld.actions] == ["RETRIEVE", "ABSTAIN"]
