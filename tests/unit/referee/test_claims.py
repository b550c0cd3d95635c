"""Claims of an answer: how they are cut, what words alone say, how a judge is asked, and what the rules do."""

import asyncio
import random
from typing import Any

import httpx2
import pytest
from claim_judge import ClaimJudge

from rorqual.data.tasks.claim_faults import FAULTS, corrupt
from rorqual.data.tasks.claims import ClaimsFamily
from rorqual.data.tasks.world import World
from rorqual.errors import RequestError
from rorqual.referee import Answer, Asked, Evidence, Options, Policy, Referee, Verdict, options_of
from rorqual.referee.check import Checked, check_answer
from rorqual.referee.claims import read_claim, split_claims
from rorqual.referee.judge import read_verdicts
from rorqual.referee.judge_url import JudgeServer
from rorqual.referee.policy import PROFILES, BudgetBody
from rorqual.referee.sources import SourceIndex, words_of

SOURCES = (
    Evidence("doc-1", "Ann Vale was born in Oslo in 1904. She worked as a baker for thirty years."),
    Evidence("doc-2", "Bob Reed beat Ann Vale at chess. On 1931-05-03 he moved to Bergen."),
    Evidence("doc-4", "The mayor of Oslo was Carl Holm."),
)
QUESTION = "Who was Ann Vale?"


def said(text: str) -> list[str]:
    return [claim.said for claim in split_claims(text)]


# ---------------------------------------------------------------- cutting


def test_sentences_keep_what_is_cited_and_quoted_behind_them():
    text = '1. Ann was born in Oslo. [doc-1] "Born there. In Oslo."\n2. She baked bread daily. [doc-2]'
    first, second = split_claims(text)
    assert (first.said, first.cited, first.quotes) == ("Ann was born in Oslo.", ("doc-1",), ("Born there. In Oslo.",))
    assert text[slice(*first.span)] == 'Ann was born in Oslo. [doc-1] "Born there. In Oslo."'
    assert (second.said, second.cited) == ("She baked bread daily.", ("doc-2",))


@pytest.mark.parametrize("text", [
    "I don't know.", "Here is what I found:", "# Ann Vale", "What else do you want to know?", "Sure!",
    "```\nx is 3\n```", "The sources do not say where she lived.", "", "Thanks for asking about it.", "| Ann | Oslo |",
])  # fmt: skip
def test_what_claims_nothing(text: str):
    assert said(text) == []


def test_parts_that_can_be_true_alone():
    assert said("Ann Vale was born in Oslo and worked for years as a baker; she died in 1980.") == [
        "Ann Vale was born in Oslo and worked for years as a baker", "Ann Vale died in 1980.",
    ]  # fmt: skip
    assert said("Mr. Reed met Dr. Vale at 3.5 km. They left.") == ["Mr. Reed met Dr. Vale at 3.5 km."]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "claim, support, is_suspected",
    [
        ("Ann Vale was born in Oslo in 1904.", "supported", False),
        ("In 1904 Ann Vale was born in Oslo.", "supported", False),
        ("Ann Vale was born in Oslo in 1905.", "contradicted", True),
        ("Ann Vale was not born in Oslo in 1904.", None, False),
        ("Bob Reed beat Ann Vale at chess.", "supported", False),
        ("Ann Vale beat Bob Reed at chess.", None, False),
        ("Bob Reed moved to Bergen on 3 May 1931.", None, False),
        ("Ann Vale owned a bakery in Lisbon.", None, True),
        ("Ann Vale came into the world in Oslo.", None, False),
        ("The mayor of Oslo was Carl Holm.", "supported", False),
        ("The mayor of Oslo was Dora Lund.", "contradicted", True),
        ("The mayor of Oslo was not Dora Lund.", None, True),
        ("The mayor of Oslo was in Lund.", None, True),
        ("Ann Vale won 17 prizes for her bread in Oslo.", None, True),
    ],
)
def test_words_decide_only_what_they_can(claim: str, support: str | None, is_suspected: bool):
    (one,) = split_claims(claim)
    reading = read_claim(one, SourceIndex(SOURCES), frozenset(words_of(QUESTION)))
    assert (reading.support, reading.is_suspected) == (support, is_suspected)


def test_numbers_dates_and_forms_have_one_spelling():
    assert words_of("1,200 on 2024-05-03") == words_of("1200 on 3 May 2024")
    assert words_of("three bakers") == words_of("3 baker's")
    assert words_of("employed") == words_of("employs")


# ---------------------------------------------------------------- S-CLAIM


def family() -> ClaimsFamily:
    return ClaimsFamily(World.build("claims-test", "tiny"))


def items(count: int, seed: int = 0) -> list[Any]:
    made = family()
    found = [made.make_item(random.Random(f"{seed} {i}"), "test", i) for i in range(count)]
    return [item for item in found if item.meta["attributes"]]


def on_item(item: Any, text: str, **more: Any) -> Checked:
    asked = Asked({"model": "m", "messages": list(item.messages)})
    return check_answer(
        asked, Answer(text, finish="stop"), Options("annotate", Policy(), ("citations", "claims"), **more)
    )


def test_every_fault_is_seen_by_words_alone_and_nothing_in_clean_answers():
    made, caught = family(), {fault: [0, 0] for fault in FAULTS}
    for item in items(70):
        clean, _ = corrupt(made, item, "clean", random.Random(item.id))
        assert not on_item(item, clean).findings
        for fault in FAULTS:
            text, _ = corrupt(made, item, fault, random.Random(f"{item.id} {fault}"))
            caught[fault][0] += bool(on_item(item, text).findings)
            caught[fault][1] += 1
    assert all(found >= 0.98 * tried for found, tried in caught.values()), caught
    sure = {
        "wrong-citation": "quote_not_found",
        "altered-quote": "quote_not_found",
        "missing-citation": "citation_missing",
    }
    for fault, code in sure.items():
        text, _ = corrupt(made, items(20)[3], fault, random.Random(1))  # type: ignore[arg-type]
        assert code in {one.code for one in on_item(items(20)[3], text).findings}


def test_sources_are_those_given_or_the_numbered_lines_of_the_question():
    item = items(10)[2]
    facts = family().facts_of(item)
    given = tuple(Evidence(str(fact.source), fact.sentence) for fact in facts)
    text, _ = corrupt(family(), item, "altered-quote", random.Random(3))
    assert [one.code for one in on_item(item, text).findings] == ["quote_not_found"]
    assert on_item(item, text, evidence=given).findings == on_item(item, text).findings


# ---------------------------------------------------------------- the judge


def truth(said: str) -> str:
    return "contradicted" if "Bergen" in said else "not found" if "Lisbon" in said else "supported"


def judged(
    content: str, judge: ClaimJudge, *, mode: str = "enforce", profile: str = "assistant", **more: Any
) -> Verdict:
    asked = Asked({"model": "m", "messages": [{"role": "user", "content": QUESTION}]})
    options = Options(mode, Policy(PROFILES[profile]), ("claims",), evidence=SOURCES, **more)  # type: ignore[arg-type]
    answer = Answer(
        content, reasoning="I made it up.", finish="stop", usage={"completion_tokens": 50, "prompt_tokens": 99}
    )
    return asyncio.run(Referee().judge_answer(asked, answer, options, judge))


WRONG = "Ann Vale grew up in Bergen."
LOST = "Ann Vale owned a shop in Lisbon."
FINE = "Ann Vale came into the world in Oslo."


def test_the_judge_is_asked_blind_and_the_second_time_the_other_way_round():
    judge = ClaimJudge(truth)
    judged(f"{FINE} [doc-1]\n{LOST}\n{WRONG}", judge, mode="annotate")
    first, second = judge.bodies[:2]
    text = first["messages"][-1]["content"]
    assert "made it up" not in str(first) and "[doc-1]" not in text.partition("Claims:")[2]
    assert text.index(FINE) < text.index(LOST) < text.index(WRONG)
    other = second["messages"][-1]["content"]
    assert WRONG in other and FINE not in other and LOST not in other  # words and judge agreed of it at once
    verdicts = [[body["messages"][0]["content"].index(f"- {one}") for one in ("supported", "not found")]
                for body in (first, second)]  # fmt: skip
    assert verdicts[0] == sorted(verdicts[0]) and verdicts[1] == sorted(verdicts[1], reverse=True)
    assert first["seed"] != second["seed"]


def test_verdicts_are_read_leniently_and_the_first_of_a_number_counts():
    text = '1. Supported\n**2** - contradicted: "a b"\n3: NOT_FOUND “c”\n3 supported\n9 supported\nnonsense'
    found = read_verdicts(text, 3)
    assert [(found[n].support, found[n].span) for n in (1, 2, 3)] == [
        ("supported", ""), ("contradicted", "a b"), ("not found", "c"),
    ]  # fmt: skip
    assert set(found) == {1, 2, 3}


def test_a_span_may_stand_in_what_was_shown_for_another_claim():
    far = tuple(Evidence(f"near-{i}", f"Ann Vale grew up in Bergen{i}x.") for i in range(4))
    far += (Evidence("far", "Nobody called Vale has ever lived outside Hamar."),)
    options = Options("annotate", Policy(), ("claims",), evidence=far)
    asked = Asked({"model": "m", "messages": [{"role": "user", "content": QUESTION}]})

    async def judge(body: Any) -> Answer:
        assert "outside Hamar" in body["messages"][-1]["content"]
        return Answer('1 contradicted "has ever lived outside Hamar"\n2 supported', finish="stop")

    answer = Answer("Ann Vale grew up in Lund.\nNobody there has lived far outside old Hamar.", finish="stop")
    verdict = asyncio.run(Referee().judge_answer(asked, answer, options, judge))
    assert "claim_contradicted" in {code for one in verdict.rounds_asked for code in one["codes"]} | {
        one.code for one in verdict.findings
    }


def test_a_negative_verdict_needs_a_span_that_exists():
    async def invents(body: Any) -> Answer:
        return Answer('1 contradicted "Ann Vale was a pilot"', finish="stop")

    asked = Asked({"model": "m", "messages": [{"role": "user", "content": QUESTION}]})
    options = Options("enforce", Policy(), ("claims",), evidence=SOURCES)
    verdict = asyncio.run(Referee().judge_answer(asked, Answer(FINE, finish="stop"), options, invents))
    assert verdict.word == "pass" and verdict.judging is not None
    assert verdict.judging["negative"] == verdict.judging["dropped"] == 1


@pytest.mark.parametrize("votes, profile", [(1, "assistant"), (3, "regulated")])
def test_catch_and_false_alarm_follow_the_judges_error_rates(votes: int, profile: str):
    """Of claims that words do not suspect: two judge's votes of two, or of three."""
    miss, alarm, count = 0.3, 0.3, 250
    names = [f"{a}{b}{c}" for a in "bdfgklmnrt" for b in "aeiou" for c in "dlmnrstz"][:count]
    evidence = tuple(Evidence(name, f"{name.title()} lives beside the old mill.") for name in names)
    asked = Asked({"model": "m", "messages": [{"role": "user", "content": "Where do they live?"}]})
    budget = BudgetBody(max_rounds=0, token_ratio=100, wall_ms=1e6)
    options = Options("annotate", Policy(PROFILES[profile]), ("claims",), budget, evidence)
    shares = []
    for is_right in (False, True):
        judge = ClaimJudge(lambda one, right=is_right: "supported" if right else "not found", miss, alarm)
        found = 0
        for at in range(0, count, 50):
            text = "\n".join(f"{name.title()} has a house near the mill." for name in names[at : at + 50])
            verdict = asyncio.run(Referee().judge_answer(asked, Answer(text, finish="stop"), options, judge))
            found += sum(one.code == "claim_not_found" for one in verdict.findings)
        shares.append(found / count)
    against = 1 - miss, alarm
    expected = [p**2 if votes == 1 else p**3 + 3 * p**2 * (1 - p) for p in against]
    for share, p in zip(shares, expected, strict=True):
        assert abs(share - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_a_judge_over_http_and_its_failures():
    judge = ClaimJudge(truth)

    def answer(request: httpx2.Request) -> httpx2.Response:
        import json

        assert request.headers["authorization"] == "Bearer k"
        return httpx2.Response(200, json=judge.reply(json.loads(request.content)))

    server = JudgeServer("http://judge/v1", "big", "k", transport=httpx2.MockTransport(answer))
    asked = Asked({"model": "m", "messages": [{"role": "user", "content": QUESTION}]})
    options = Options("annotate", Policy(), ("claims",), evidence=SOURCES)
    found = asyncio.run(Referee(judge=server.judge).judge_answer(asked, Answer(LOST, finish="stop"), options))
    assert [one.code for one in found.findings] == ["claim_not_found"] and judge.bodies[0]["model"] == "big"
    broken = JudgeServer("http://judge", "big", transport=httpx2.MockTransport(lambda _: httpx2.Response(500)))
    with pytest.raises(RequestError, match="answered 500"):
        asyncio.run(broken.ask({}))
    for profile, word in (("assistant", "pass"), ("regulated", "abstained")):
        hard = Options("enforce", Policy(PROFILES[profile]), ("claims",), evidence=SOURCES)
        verdict = asyncio.run(Referee(judge=broken.judge).judge_answer(asked, Answer(LOST, finish="stop"), hard))
        assert verdict.word == word and "judge_failed" in {one.code for one in verdict.findings}


def test_no_judge_is_asked_where_words_suffice_or_the_budget_says_no():
    judge = ClaimJudge(truth)
    assert judged("Ann Vale was born in Oslo in 1904.", judge).word == "pass" and not judge.bodies
    verdict = judged(LOST, judge, budget=BudgetBody(token_ratio=0))
    assert not judge.bodies and {"judge_failed", "claim_suspected"} == {one.code for one in verdict.findings}


# ---------------------------------------------------------------- rules 7 and 8


def test_only_the_sentence_at_fault_is_asked_for_again():
    judge = ClaimJudge(truth, right=lambda one: "Ann Vale grew up in Oslo.")
    verdict = judged(f"{FINE}\n- {WRONG}", judge)
    assert verdict.word == "repaired" and verdict.rounds == 1
    assert verdict.answer is not None and verdict.answer.content == f"{FINE}\n- Ann Vale grew up in Oslo."
    asked_again = next(b for b in judge.bodies if "are not what the sources say" in str(b["messages"]))
    assert FINE not in asked_again["messages"][0]["content"]
    assert [one["action"] for one in verdict.actions] == ["RE-ASK", "PASS"]


def test_a_sentence_that_stays_wrong_is_removed_and_marked_or_told():
    judge = ClaimJudge(truth, fixes=0.0)
    verdict = judged(f"{FINE}\n- {WRONG}\nBob Reed beat Ann Vale at chess.", judge)
    assert verdict.word == "repaired" and verdict.answer is not None
    assert verdict.answer.content == (
        f"{FINE}\nBob Reed beat Ann Vale at chess.\n\n"
        "[1 of its statements was removed: the sources given do not support it.]"
    )
    assert verdict.actions[-1]["action"] == "REMOVE" and verdict.rounds == 1
    told = judged(f"{FINE}\n- {WRONG}", ClaimJudge(truth, fixes=0.0), mode="annotate")
    assert told.word == "flagged" and told.answer is not None and WRONG in (told.answer.content or "")
    alone = judged(WRONG, ClaimJudge(truth, fixes=0.0))
    assert alone.word == "abstained" and alone.answer is not None and "Bergen" not in (alone.answer.content or "")


def test_an_upstream_that_says_the_same_again_ends_with_the_sentence_taken_out():
    async def repeats(body: Any) -> Answer:
        return Answer(content, finish="stop")

    content = "Ann Vale was born in Oslo in 1904. The mayor of Oslo was Dora Lund."
    asked = Asked({"model": "m", "messages": [{"role": "user", "content": QUESTION}]})
    options = Options("enforce", Policy(), ("claims",), evidence=SOURCES)
    verdict = asyncio.run(Referee().judge_answer(asked, Answer(content, finish="stop"), options, repeats))
    assert verdict.answer is not None and verdict.word == "repaired"
    assert (verdict.answer.content or "").startswith("Ann Vale was born in Oslo in 1904.") and "Dora" not in str(
        verdict.answer.content
    )


def test_what_is_not_found_is_marked_or_removed_by_profile():
    marked = judged(f"{FINE} {LOST}", ClaimJudge(truth))
    assert marked.word == "pass" and [(one.code, one.status) for one in marked.findings] == [
        ("claim_not_found", "warn")
    ]
    removed = judged(f"{FINE} {LOST}", ClaimJudge(truth), profile="regulated")
    assert removed.answer is not None and (removed.answer.content or "").startswith(f"{FINE}\n\n[1 of its")


def test_more_is_retrieved_where_nothing_was_found():
    class Finds:
        async def retrieve(self, request: Asked, answer: Answer) -> list[Evidence]:
            return [Evidence("doc-3", "In 1950 Ann Vale owned a shop in Lisbon.")]

    asked = Asked({"model": "m", "messages": [{"role": "user", "content": QUESTION}]})
    options = Options("enforce", Policy(), ("claims",), evidence=SOURCES)
    judge = ClaimJudge(truth)

    async def ask(body: Any) -> Answer:
        if "doc-3" in str(body["messages"]):
            return Answer(LOST, finish="stop")
        return await judge(body)

    verdict = asyncio.run(
        Referee(retriever=Finds()).judge_answer(asked, Answer("x " + LOST, finish="stop"), options, ask)
    )
    assert [one["action"] for one in verdict.actions] == ["RETRIEVE", "PASS"] and not verdict.findings


def test_the_verdict_tells_what_judging_took():
    verdict = judged(f"{FINE} {LOST}", ClaimJudge(truth)).to_dict()
    row = next(one for one in verdict["checks"] if one["name"] == "claims")
    assert row["cost"]["tokens"] == verdict["judging"]["prompt_tokens"] + verdict["judging"]["completion_tokens"] > 0
    assert verdict["usage"]["completion_tokens"] == verdict["judging"]["completion_tokens"]
    assert verdict["judging"]["claims"] == 2 and verdict["judging"]["calls"] == 1


def test_claims_are_asked_for_by_name_and_buffer_streams_that_enforce():
    own = options_of({"mode": "enforce", "checks": ["claims"], "stream": "holdback"}, Options("annotate", Policy()))
    assert own.streaming == "buffer"
    assert options_of(
        {"checks": ["copy"], "stream": "holdback"}, Options("enforce", Policy(), ("copy",))
    ).streaming == ("holdback")
    profile = options_of({"profile": {"claims": "remove", "votes": 3}}, Options("annotate", Policy())).policy.profile
    assert (profile.claims, profile.votes) == ("remove", 3)
    stays = options_of({"profile": {"claims": "mark"}}, Options("enforce", Policy(PROFILES["regulated"])))
    assert (stays.policy.profile.claims, stays.policy.profile.votes) == ("remove", 3)


@pytest.mark.parametrize("text", ["a. " * 40_000, '"' * 60_000, "[1] " * 40_000, "x and is " * 20_000, "A; " * 40_000])
def test_long_answers_and_sources_are_read_in_time(text: str):
    """Hours, if any of it were quadratic."""
    evidence = tuple(Evidence(str(i), text[: 1 << 16]) for i in range(4))
    asked = Asked({"model": "m", "messages": [{"role": "user", "content": f"Cite [source].\n[1] {text}"}]})
    check_answer(
        asked, Answer(text, finish="stop"), Options("annotate", Policy(), ("citations", "claims"), evidence=evidence)
    )
    check_answer(asked, Answer(text, finish="stop"), Options("annotate", Policy(), ("citations", "claims")))
