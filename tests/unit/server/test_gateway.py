"""The gateway in front of a mock upstream: modes, rules, streams, refusals, audit. All in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mock_upstream import USAGE, MockUpstream, calls, says
from starlette.testclient import TestClient

from rorqual.journal import Event, replay_folder
from rorqual.ledger import Ledger
from rorqual.ledger import keys as stored
from rorqual.money import PICOS
from rorqual.referee import Answer, Asked, Options, Policy, Referee
from rorqual.referee.audit import Audit
from rorqual.referee.policy import PROFILES, Forbid
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_wire import Upstream
from rorqual.server.operations import Operations

WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                           "required": ["city"], "additionalProperties": False}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
         {"type": "function", "function": {"name": "delete_file", "parameters": {"type": "object"}}}]  # fmt: skip
GOOD = calls("get_weather", '{"city": "Oslo"}')
BAD = calls("get_weather", '{"REJECTED": 1}')
POLICY = Policy(PROFILES["assistant"], forbid=(Forbid(tool="delete_*", because="nothing is deleted here"),))


@contextmanager
def in_front_of(
    mock: MockUpstream, mode: str = "enforce", *, policy: Policy = POLICY, **more: Any
) -> Iterator[TestClient]:
    upstream = Upstream("http://mock", transport=httpx2.ASGITransport(app=mock.app(), raise_app_exceptions=False))
    gateway = Gateway(upstream, Options(mode, policy), **more)  # type: ignore[arg-type]
    with TestClient(create_gateway(gateway), raise_server_exceptions=False) as client:
        client.gateway = gateway  # type: ignore[attr-defined]
        yield client


def ask(client: TestClient, text: str = "The weather of Oslo?", **fields: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "tools": TOOLS, **fields}
    return client.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer sk-client-key-0123456789"})


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def joined(chunks: list[dict[str, Any]]) -> tuple[str, str, list[Any], str | None]:
    """Content, reasoning, calls and finish reason of a stream."""
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices")]
    made: dict[int, dict[str, Any]] = {}
    for part in (call for delta in deltas for call in delta.get("tool_calls", ())):
        call = made.setdefault(part["index"], {**part, "function": {**part["function"], "arguments": ""}})
        call["function"]["arguments"] += part["function"]["arguments"]
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk.get("choices")]
    return (
        "".join(delta.get("content") or "" for delta in deltas),
        "".join(delta.get("reasoning_content") or "" for delta in deltas),
        list(made.values()),
        finishes[-1] if finishes else None,
    )


# ---------------------------------------------------------------- modes


def test_observe_passes_bytes_on_and_judges_beside():
    mock = MockUpstream([says("", calls=[BAD])])
    with in_front_of(mock, "observe") as client:
        answer = ask(client)
        assert answer.json()["choices"][0]["message"]["tool_calls"] == [BAD]
        assert "referee" not in answer.json() and "x-referee-verdict" not in answer.headers
        streamed = ask(client, stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n") and "REJECTED" in json.dumps(joined(events(streamed)))
        assert client.gateway.verdicts == {"flagged": 2}  # type: ignore[attr-defined]
    assert mock.headers[0]["authorization"] == "Bearer sk-client-key-0123456789"
    assert "referee" not in mock.bodies[0] and len(mock.bodies) == 2


def test_a_request_chooses_its_mode_and_off_is_bare():
    mock = MockUpstream([says("", calls=[BAD])])
    with in_front_of(mock, "observe") as client:
        assert ask(client, referee={"mode": "enforce", "budget": {"max_rounds": 0}}).status_code == 422
        flagged = ask(client, referee={"mode": "annotate", "budget": {"max_rounds": 0}})
        assert flagged.json()["referee"]["verdict"] == flagged.headers["x-referee-verdict"] == "flagged"
        assert "referee" not in ask(client, referee={"mode": "off"}).json()
    assert all("referee" not in body for body in mock.bodies)


def test_what_passes_goes_out_as_it_came():
    answer = says("Hello.", reasoning="Be kind.")
    answer["message"]["annotations"] = []
    with in_front_of(MockUpstream([answer])) as client:
        got = ask(client)
        body = got.json()
        assert body["choices"][0]["message"] == answer["message"] and body["usage"] == USAGE and body["id"] == "up-1"
        assert got.headers["x-referee-verdict"] == "pass" and got.headers["x-referee-rounds"] == "0"
        told = body["referee"]
        assert {"verdict", "p_correct", "checks", "rounds", "usage", "actions", "policy_id"} <= set(told)
        row = {"name", "status", "reason_code", "span", "evidence_ids", "cost"}
        assert all(row <= set(check) for check in told["checks"])
        assert [check["status"] for check in told["checks"]] == ["pass"] * 5
        assert told["actions"] == [{"rule": 12, "action": "PASS"}]


# ---------------------------------------------------------------- rules


def test_rule_2_a_forbidden_call_is_blocked():
    for mode in ("enforce", "annotate"):
        mock = MockUpstream([says("", calls=[GOOD, calls("delete_file", "{}", "call_2")])])
        with in_front_of(mock, mode) as client:
            body = ask(client).json()
            message = body["choices"][0]["message"]
            assert [call["id"] for call in message["tool_calls"]] == ["call_1"]
            assert "nothing is deleted here" in message["content"]
            assert body["referee"]["verdict"] == "blocked" and body["referee"]["actions"][-1]["rule"] == 2
        assert len(mock.bodies) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "tools"),
    [
        ("delete_file", '{"path": "a', TOOLS),
        ("delete_file", '{"path": "a", "path": "b"}', TOOLS),
        ("delete_all", "{}", TOOLS),
        ("delete_file", "{}", None),
        ("shell", '{"command": "rm -rf /', [{"type": "function", "function": {"name": "shell"}}]),
        ("shell", '{"command": "rm -rf /"}', TOOLS),
    ],
)
def test_rule_2_holds_for_calls_that_are_broken_besides(name: str, arguments: str, tools: Any):
    rules = (*POLICY.forbid, Forbid(tool="shell", argument="command", matches=r"\brm\s+-rf\b"))
    mock = MockUpstream([says("", calls=[calls(name, arguments)])])
    with in_front_of(mock, "annotate", policy=Policy(forbid=rules)) as client:
        body = ask(client, tools=tools, referee={"budget": {"max_rounds": 0}}).json()
        assert body["referee"]["verdict"] == "blocked"
        assert not body["choices"][0]["message"].get("tool_calls")


def test_rule_3_a_local_repair_costs_no_round():
    mock = MockUpstream([says("", calls=[calls("get_weather", "{'city': 'Oslo', 'days': '3',}")])])
    with in_front_of(mock) as client:
        body = ask(client).json()
        arguments = body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(arguments) == {"city": "Oslo", "days": 3}
        assert body["referee"]["verdict"] == "repaired" and body["referee"]["rounds"] == 0
        assert {action["rule"] for action in body["referee"]["actions"]} == {3, 12}
    assert len(mock.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_rule_4_asks_again_with_what_was_wrong_and_nothing_else(stream: bool):
    mock = MockUpstream([says("", calls=[BAD], reasoning="Let me see."), says("", calls=[GOOD], reasoning="Now.")])
    with in_front_of(mock) as client:
        answer = ask(client, stream=stream)
        assert "REJECTED" not in answer.text.replace(json.dumps("`REJECTED`")[1:-1], "")
        if stream:
            chunks = events(answer)
            _, reasoning, made, finish = joined(chunks)
            told = next(chunk["referee"] for chunk in chunks if "referee" in chunk)
            assert (reasoning, finish) == ("Now.", "tool_calls")
            assert [call["function"] for call in made] == [GOOD["function"]]
        else:
            body = answer.json()
            told = body["referee"]
            assert body["choices"][0]["message"]["tool_calls"] == [GOOD]
            assert body["usage"]["completion_tokens"] == 2 * USAGE["completion_tokens"]
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 20
        assert told["verdict"] == "repaired" and told["rounds"] == 1 and answer.headers["x-referee-rounds"] == "1"
        assert answer.headers["x-referee-tokens"] == "120"
        assert told["actions"][0]["rule"] == 4 and told["actions"][-1]["rule"] == 12
    first, second = (body["messages"] for body in mock.bodies)
    assert second[: len(first)] == first and second[-1]["role"] == "user"
    assert "city" in second[-1]["content"] and second[-2]["reasoning_content"] == "Let me see."
    tools = mock.bodies[1]["tools"]
    assert "strict" not in tools[0]["function"] or tools[0]["function"]["strict"] is True


def test_rule_4_gives_up_within_its_budget():
    mock = MockUpstream([says("", calls=[calls("get_weather", f'{{"n": {n}}}')]) for n in range(9)])
    with in_front_of(mock) as client:
        refused = ask(client, referee={"budget": {"max_rounds": 2, "token_ratio": 50}})
        assert refused.status_code == 422 and refused.headers["x-referee-verdict"] == "rejected"
        error = refused.json()["error"]
        assert error["code"] in ("required_missing", "extra_key") and "lacks `city`" in error["message"]
        assert refused.json()["referee"]["rounds"] == 2
    assert len(mock.bodies) == 3


@pytest.mark.parametrize("budget, bound", [({"max_rounds": 0}, "max_rounds"), ({"token_ratio": 0}, "token_ratio"),
                                           ({"wall_ms": 0}, "wall_ms")])  # fmt: skip
def test_each_bound_ends_it(budget: dict[str, Any], bound: str):
    mock = MockUpstream([says("", calls=[BAD])])
    with in_front_of(mock, "annotate") as client:
        told = ask(client, referee={"budget": budget}).json()["referee"]
        assert told["verdict"] == "flagged" and told["rounds"] == 0
        assert (told["actions"][-1]["rule"], told["actions"][-1]["because"]) == (11, bound)
    assert len(mock.bodies) == 1


def test_a_round_that_takes_too_long_is_ended():
    mock = MockUpstream([says("", calls=[BAD])], delay_s=0.15)
    with in_front_of(mock, "annotate") as client:
        told = ask(client, referee={"budget": {"wall_ms": 40}}).json()["referee"]
        assert told["verdict"] == "flagged" and told["rounds"] == 1
        assert told["actions"][-1]["because"] == "the round failed"


def test_the_same_answer_again_ends_it():
    mock = MockUpstream([says("", calls=[BAD])])
    with in_front_of(mock, "annotate") as client:
        told = ask(client).json()["referee"]
        assert told["rounds"] == 1 and told["actions"][-1]["because"] == "the same answer again"


def test_the_stopping_law_ends_rounds_that_never_help():
    mock = MockUpstream([says("", calls=[BAD])])
    with in_front_of(mock, policy=Policy(PROFILES["chat"])) as client:
        rates = client.gateway.referee.rates  # type: ignore[attr-defined]
        assert ask(client).json()["referee"]["rounds"] == 1
        for _ in range(200):
            rates.note(["required_missing", "extra_key"], ["required_missing", "extra_key"])
        told = ask(client).json()["referee"]
        assert told["rounds"] == 0 and told["actions"][-1]["because"] == "not worth its cost"


def test_a_fall_back_model_is_asked_when_its_second_chance_is_gone():
    bad = [says("", calls=[calls("get_weather", f'{{"n": {n}}}')]) for n in range(2)]
    mock = MockUpstream([*bad, says("", calls=[GOOD])])
    with in_front_of(mock, referee=Referee(fallbacks=["bigger"])) as client:
        told = ask(client, referee={"budget": {"token_ratio": 50}}).json()["referee"]
        assert told["verdict"] == "repaired" and told["rounds"] == 2
    assert [body["model"] for body in mock.bodies] == ["m", "m", "bigger"]


def test_rule_5_a_wrong_copy_is_shown_where_it_stands_and_blocked_the_second_time():
    question = "The weather of station oslo-blindern-18700, please."
    wrong = [calls("get_weather", json.dumps({"city": name})) for name in ("oslo-blindem-18700", "oslo-blindren-18700")]
    right = calls("get_weather", '{"city": "oslo-blindern-18700"}')
    mock = MockUpstream([says("", calls=[wrong[0]]), says("", calls=[right])])
    with in_front_of(mock) as client:
        told = ask(client, question).json()["referee"]
        assert told["verdict"] == "repaired" and told["actions"][0]["rule"] == 5
    again = mock.bodies[1]["messages"][-1]["content"]
    assert "oslo-blindern-18700" in again and "[characters" in again and again.rstrip().endswith("corrected.")
    with in_front_of(MockUpstream([says("", calls=[one]) for one in wrong])) as client:
        body = ask(client, question).json()
        assert body["referee"]["verdict"] == "blocked" and "tool_calls" not in body["choices"][0]["message"]
        assert "oslo-blindern-18700" in body["choices"][0]["message"]["content"]


class Sure:
    """Confidence that is what a test says."""

    def __init__(self, p: float | None) -> None:
        self.p = p

    async def estimate(self, request: Asked, answer: Answer) -> float | None:
        return self.p


@pytest.mark.parametrize("p, profile, gives_it", [(0.9, "regulated", False), (0.91, "regulated", True),
                                                  (0.75, "assistant", False), (0.5, "chat", False),
                                                  (0.51, "chat", True), (None, "regulated", True)])  # fmt: skip
def test_rule_9_an_unlikely_answer_is_not_given(p: float | None, profile: str, gives_it: bool):
    mock = MockUpstream([says("GUESS: it is 1814.")])
    with in_front_of(mock, policy=Policy(PROFILES[profile]), referee=Referee(confidence=Sure(p))) as client:
        body = ask(client).json()
        assert ("GUESS" in json.dumps(body["choices"])) == gives_it
        assert body["referee"]["verdict"] == ("pass" if gives_it else "abstained")
        assert body["referee"]["p_correct"] == p
    if not gives_it:
        with in_front_of(
            mock, "annotate", policy=Policy(PROFILES[profile]), referee=Referee(confidence=Sure(p))
        ) as client:
            told = ask(client).json()
            assert told["referee"]["verdict"] == "flagged" and "GUESS" in json.dumps(told["choices"])
            assert "low_confidence" in [check["reason_code"] for check in told["referee"]["checks"]]


def test_a_request_may_ask_for_more_and_not_for_less():
    """Where the operator enforces, no client turns that off, nor the operator's checks; it may add to both."""
    mock = MockUpstream([says("So 17 * 3 = 41.")])
    with in_front_of(mock) as client:
        for weaker in ("off", "annotate"):
            refused = ask(client, referee={"mode": weaker})
            assert refused.status_code == 400 and "enforces" in refused.json()["error"]["message"]
        assert "41" not in json.dumps(ask(client, referee={"checks": []}).json()["choices"])
    with in_front_of(mock, "annotate") as client:
        assert "41" in json.dumps(ask(client).json()["choices"])
        assert "41" not in json.dumps(ask(client, referee={"mode": "enforce"}).json()["choices"])


@pytest.mark.parametrize("profile", ["chat", "assistant", {"loss_ratio": 0.001}, {"citations": "soft"}])
def test_a_profile_is_not_made_weaker_where_the_operator_enforces(profile: Any):
    evidence = [{"id": "doc-1", "text": "nothing of that"}]
    mock = MockUpstream([says('It says "the quick brown fox" [doc-1].')])
    with in_front_of(mock, policy=Policy(PROFILES["regulated"])) as client:
        told = ask(client, referee={"evidence": evidence, "profile": profile}).json()["referee"]
        assert told["verdict"] == "abstained" and told["policy_id"] == Policy(PROFILES["regulated"]).id
    with in_front_of(mock, "annotate", policy=Policy(PROFILES["regulated"])) as client:
        weaker = ask(client, referee={"evidence": evidence, "profile": "chat"}).json()["referee"]
        assert weaker["verdict"] == "pass"


def test_wrong_arithmetic_is_asked_again_and_never_given():
    mock = MockUpstream([says("So 17 * 3 = 41."), says("So 17 * 3 = 51.")])
    with in_front_of(mock) as client:
        assert ask(client).json()["choices"][0]["message"]["content"] == "So 17 * 3 = 51."
    with in_front_of(MockUpstream([says("So 17 * 3 = 41.")])) as client:
        body = ask(client).json()
        assert body["referee"]["verdict"] == "abstained" and "41" not in json.dumps(body["choices"])


# ---------------------------------------------------------------- rule 1: the upstream fails

BROKEN = (500, {"error": {"message": "out of memory", "type": "server_error"}})


def test_rule_1_a_failure_is_tried_once_more():
    mock = MockUpstream([BROKEN, says("Hello.")])
    with in_front_of(mock) as client:
        told = ask(client).json()["referee"]
        assert told["actions"][0]["rule"] == 1 and told["verdict"] == "pass"
    assert len(mock.bodies) == 2 and mock.bodies[0] == mock.bodies[1]


def test_rule_1_then_the_fall_back_and_then_the_failure_itself():
    mock = MockUpstream([BROKEN, BROKEN, says("Hello.")])
    with in_front_of(mock, referee=Referee(fallbacks=["other"])) as client:
        assert ask(client).json()["choices"][0]["message"]["content"] == "Hello."
    assert [body["model"] for body in mock.bodies] == ["m", "m", "other"]
    with in_front_of(MockUpstream([BROKEN])) as client:
        for stream in (False, True):
            refused = ask(client, stream=stream)
            assert refused.status_code == 500 and refused.json() == BROKEN[1]


def test_a_refusal_comes_back_word_for_word_and_is_not_repeated():
    refusal = (429, {"error": {"message": "slow down", "type": "rate_limit"}, "extra": [1]})
    for mode in ("observe", "annotate", "enforce"):
        mock = MockUpstream([refusal])
        with in_front_of(mock, mode) as client:
            got = ask(client)
            assert (got.status_code, got.json(), got.headers["retry-after"]) == (429, refusal[1], "7")
        assert len(mock.bodies) == 1


# ---------------------------------------------------------------- streams

PARAGRAPHS = " ".join(f"This is sentence {n} of a longer answer about whales." for n in range(40))


@pytest.mark.parametrize("way", ["buffer", "holdback", "annotate_after"])
def test_a_stream_says_what_the_whole_answer_says(way: str):
    mode = "annotate" if way == "annotate_after" else "enforce"
    mock = MockUpstream([says(PARAGRAPHS, reasoning="Whales, then."), says("", calls=[GOOD], reasoning="Look.")])
    with in_front_of(mock, mode) as client:
        chunks = events(ask(client, stream=True, referee={"stream": way}, stream_options={"include_usage": True}))
        assert joined(chunks[:-1]) == (PARAGRAPHS, "Whales, then.", [], "stop")
        assert chunks[-1]["usage"] == USAGE and chunks[-1]["choices"] == []
        (told,) = [chunk for chunk in chunks if "referee" in chunk]
        assert told["referee"]["verdict"] == "pass" and told["choices"][0]["delta"] == {}
        count = sum(bool(chunk["choices"] and chunk["choices"][0]["delta"].get("content")) for chunk in chunks)
        assert (count == 1) == (way == "buffer") and (count > 100) == (way == "annotate_after")
        content, reasoning, made, finish = joined(events(ask(client, stream=True, referee={"stream": way})))
        assert (content, reasoning, finish) == ("", "Look.", "tool_calls") and len(made) == 1
        assert made[0]["index"] == 0 and made[0]["function"] == GOOD["function"]


FAULTS: dict[str, dict[str, Any]] = {
    "a broken call": says("REJECTED", calls=[BAD]),
    "wrong arithmetic": says(f"{PARAGRAPHS} So 17 * 3 = 41 REJECTED. {PARAGRAPHS}"),
    "a control token": says(f"{PARAGRAPHS} <｜User｜>REJECTED. {PARAGRAPHS}"),
    "reasoning in the text": says(f"<think>REJECTED {PARAGRAPHS}"),
    "a call as text": says(f"{PARAGRAPHS}\n<tool_call>REJECTED</tool_call>"),
}


@pytest.mark.parametrize("way", ["buffer", "holdback"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_rejected_text_is_never_on_the_wire(way: str, fault: str, piece: int):
    mock = MockUpstream([FAULTS[fault], FAULTS[fault], FAULTS[fault]], piece=piece)
    with in_front_of(mock) as client:
        answer = ask(client, stream=True, referee={"stream": way})
        shown = answer.text if answer.status_code == 422 else joined(events(answer))
        for told in ("REJECTED`", "`REJECTED"):
            shown = str(shown).replace(told, "")  # the refusal names the argument that the tool does not have
        assert "REJECTED" not in str(shown)


@pytest.mark.parametrize("way", ["buffer", "holdback", "annotate_after"])
@pytest.mark.parametrize("breaks_after", [0, 1, 5, 100, 300])
def test_an_upstream_that_breaks_off_within_a_stream(way: str, breaks_after: int):
    mode = "annotate" if way == "annotate_after" else "enforce"
    mock = MockUpstream([says(PARAGRAPHS, reasoning="Whales.")], breaks_after=breaks_after)
    with in_front_of(mock, mode) as client:
        answer = ask(client, stream=True, referee={"stream": way})
        if answer.status_code == 200:
            chunks = events(answer)
            assert chunks[-1]["error"]["type"] == "upstream_error" and "[DONE]" not in answer.text
            content = joined(chunks[:-1])[0]
            assert PARAGRAPHS.startswith(content) and len(mock.bodies) == 1
        else:
            assert answer.status_code == 502 and len(mock.bodies) == 2


@pytest.mark.parametrize("way", ["buffer", "holdback", "annotate_after"])
def test_a_refusal_is_streamed_too(way: str):
    parts = [{"role": "assistant", "refusal": "I will "}, {"refusal": "not."}]
    lines = [{"choices": [{"index": 0, "delta": one, "finish_reason": None}]} for one in parts]
    lines.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    content = "".join(f"data: {json.dumps(one)}\n\n" for one in lines) + "data: [DONE]\n\n"
    transport = httpx2.MockTransport(
        lambda request: httpx2.Response(200, content=content.encode(), headers={"content-type": "text/event-stream"})
    )
    with TestClient(
        create_gateway(Gateway(Upstream("http://mock", transport=transport), Options("annotate", POLICY)))
    ) as client:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(ask(client, stream=True, referee={"stream": way}))]
    assert "".join(delta.get("refusal") or "" for delta in deltas) == "I will not."


def test_text_that_is_out_is_corrected_apart_and_calls_behind_it_are_asked_again():
    mock = MockUpstream([says(PARAGRAPHS + "<|im_end|>")])
    with in_front_of(mock, "annotate") as client:
        chunks = events(ask(client, stream=True))
        (told,) = [chunk["referee"] for chunk in chunks if "referee" in chunk]
        assert told["verdict"] == "repaired" and told["correction"]["content"] == PARAGRAPHS
    mock = MockUpstream([says(PARAGRAPHS, calls=[BAD]), says("Another text.", calls=[GOOD])])
    with in_front_of(mock) as client:
        content, _, made, finish = joined(events(ask(client, stream=True, referee={"stream": "holdback"})))
        assert PARAGRAPHS.startswith(content) and len(content) > 200 and "Another" not in content
        assert [call["function"] for call in made] == [GOOD["function"]] and finish == "tool_calls"


def test_halves_of_characters_do_no_harm():
    mock = MockUpstream(
        [says("a \ud83d b", calls=[calls("get_weather", '{"city": "\ud83d"}')]), says("\U0001f40b!")], piece=1
    )
    with in_front_of(mock, "annotate") as client:
        assert ask(client).json()["choices"][0]["message"]["content"] == "a \ufffd b"
        for way in ("buffer", "holdback", "annotate_after"):
            mock.answers = [says("a \ud83d b")]
            assert joined(events(ask(client, stream=True, referee={"stream": way})))[0] == "a \ufffd b"


# ---------------------------------------------------------------- the request object


@pytest.mark.parametrize("given, param", [
    ({"mood": 1}, "referee.mood"), ({"mode": "observe"}, "referee.mode"),
    ({"checks": ["spelling"]}, "referee.checks.0"),
    ({"checks": ["code"]}, "referee.checks"), ({"budget": {"rounds": 1}}, "referee.budget.rounds"),
    ({"budget": {"max_rounds": -1}}, "referee.budget.max_rounds"), ({"profile": "brave"}, "referee.profile"),
    ({"profile": {"brave": 1}}, "referee.profile"), ({"stream": "annotate_after"}, "referee.stream"),
    ({"pins": [[0, 4]]}, "referee.pins"), ({"evidence": [{"id": "a", "uri": "file:///x"}]}, "referee.evidence[0]"),
    ("enforce", "referee"),
])  # fmt: skip
def test_fields_nobody_acts_on_are_refused(given: Any, param: str):
    mock = MockUpstream([says("Hello.")])
    with in_front_of(mock) as client:
        refused = ask(client, referee=given)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert not mock.bodies


def test_a_custom_profile_may_forbid_more_and_never_less():
    mock = MockUpstream([says("", calls=[GOOD]), says("", calls=[calls("delete_file", "{}")])])
    with in_front_of(mock) as client:
        profile = {"loss_ratio": 2, "forbid": [{"tool": "get_*"}]}
        assert ask(client, referee={"profile": profile}).json()["referee"]["verdict"] == "blocked"
        assert ask(client, referee={"profile": {"loss_ratio": 2}}).json()["referee"]["verdict"] == "blocked"


def test_an_answer_somebody_has_is_judged_without_a_model():
    mock = MockUpstream([says("")])
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    with in_front_of(mock, "observe") as client:
        broken = {"role": "assistant", "content": None, "tool_calls": [calls("get_weather", "{'city': 'Oslo'}")]}
        got = client.post("/v1/referee/check", json={**body, "answer": broken}).json()
        assert got["referee"]["verdict"] == "repaired" and got["message"]["tool_calls"] == [
            {**GOOD, "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
        ]
        broken["tool_calls"] = [BAD]
        enforced = client.post(
            "/v1/referee/check", json={**body, "answer": broken, "referee": {"mode": "enforce"}}
        ).json()
        assert (
            enforced["referee"]["verdict"] == "rejected" and enforced["message"] is None and enforced["error"]["code"]
        )
        assert client.post("/v1/referee/check", json={**body, "answer": broken, "more": 1}).status_code == 400
    assert not mock.bodies


@pytest.mark.parametrize(
    "answer", [{"tool_calls": 5}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": {"tool_calls": 5}}]}]
)
def test_an_answer_that_is_none_is_refused(answer: dict[str, Any]):
    with in_front_of(MockUpstream([says("")])) as client:
        refused = client.post("/v1/referee/check", json={"answer": answer})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "answer"


def test_a_password_of_the_upstream_is_told_to_nobody():
    sent: list[str] = []

    def refuse(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.headers["authorization"])
        raise httpx2.ConnectError("no")

    upstream = Upstream("http://me:pass-word@mock/v1", transport=httpx2.MockTransport(refuse))
    with TestClient(create_gateway(Gateway(upstream, Options("enforce", POLICY)))) as client:
        told = client.get("/stats").text + client.get("/v1/models").text
    assert "http://mock" in told and "pass-word" not in told and sent[0].startswith("Basic ")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("mode", ["observe", "annotate"])
@pytest.mark.parametrize("event", [DEEP, '{"choices": 5}', '{"choices": [{"delta": {"tool_calls": 5}}]}'])
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_sends_anything_is_told_of_or_passed_on(mode: str, event: str, stream: bool):
    kind = "text/event-stream" if stream else "application/json"
    content = f"data: {event}\n\ndata: [DONE]\n\n" if stream else event
    transport = httpx2.MockTransport(
        lambda request: httpx2.Response(200, content=content.encode(), headers={"content-type": kind})
    )
    gateway = Gateway(Upstream("http://mock", transport=transport), Options(mode, POLICY))  # type: ignore[arg-type]
    with TestClient(create_gateway(gateway), raise_server_exceptions=False) as client:
        got = ask(client, stream=stream)
        if mode == "observe":
            assert got.status_code == 200 and got.text == content
        else:
            assert got.status_code == 502 and got.json()["error"]["type"] == "upstream_error"


def test_the_rest_passes_through():
    with in_front_of(MockUpstream([says("")])) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "m"
        assert client.post("/v1/completions", json={"prompt": "abc"}).json()["choices"][0]["text"] == "abc"
        assert client.post("/v1/messages", json={}).json()["type"] == "error"
        assert ask(client, n=2).status_code == 400
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/chat/completions", content=b"[").status_code == 400


# ---------------------------------------------------------------- audit and accounts

SECRET = "sk-live-0123456789abcdefABCDEF"


@pytest.mark.parametrize(
    ("path", "host"),
    [("/v1/models/%2e%2e/files", "mock"), ("/v1/models/a/%2E%2E/%2e%2e/files", "mock"), ("/v1/models", "x/v1/files?")],
)
def test_what_passes_through_reaches_no_other_endpoint(path: str, host: str):
    seen: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.url.raw_path.decode())
        return httpx2.Response(200, json={})

    upstream = Upstream("http://mock", "sk-operators", transport=httpx2.MockTransport(answer))
    with TestClient(create_gateway(Gateway(upstream, Options("enforce", POLICY)))) as client:
        status = client.get(path, headers={"host": host}).status_code
        client.get("/v1/models/org%2Fname?limit=2")
    assert seen[-1] == "/v1/models/org%2Fname?limit=2"
    assert (status, seen[:-1]) in ((404, []), (200, ["/v1/models"]), (400, []))


def test_every_verdict_is_in_the_journal_and_no_secret(tmp_path: Path):
    mock = MockUpstream([says("", calls=[calls("get_weather", json.dumps({"city": SECRET, "mood": SECRET}))])])
    question = f"My key is {SECRET}, password: hunter2hunter2"
    for number, mode in enumerate(("observe", "annotate", "enforce")):
        with in_front_of(mock, mode, audit=Audit(tmp_path / str(number), texts=True)) as client:
            ask(client, question)
        records = [one for _, one in replay_folder(tmp_path / str(number)) if isinstance(one, Event)]
        (verdict,) = [one for one in records if one.kind == "referee.verdict"]
        assert verdict.fields["model"] == "m" and verdict.fields["mode"] == mode
        assert "extra_key" in [check["reason_code"] for check in verdict.fields["checks"]]
        assert "My key is" in verdict.fields["messages"]
        stored = b"".join(path.read_bytes() for path in (tmp_path / str(number)).rglob("*") if path.is_file())
        assert SECRET.encode() not in stored and b"hunter2" not in stored and b"sk-client-key" not in stored


def test_what_rounds_cured_is_learnt_from_the_journal(tmp_path: Path):
    mock = MockUpstream([says("", calls=[BAD]), says("", calls=[GOOD])])
    with in_front_of(mock, audit=Audit(tmp_path)) as client:
        ask(client)
        rates = client.gateway.referee.rates.to_dict()  # type: ignore[attr-defined]
        assert rates["required_missing"] == {"tried": 1, "fixed": 1}
    referee, audit = Referee(), Audit(tmp_path)
    assert audit.learn(referee.rates) == 1 and referee.rates.to_dict() == rates
    audit.close()


def test_keys_budgets_and_what_rounds_cost(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    secret = stored.add(ledger.database, "alice", budget=PICOS)
    accounts = Accounts(ledger, tariff=Tariff(like="deepseek-v4-flash"))
    mock = MockUpstream([says("", calls=[BAD]), says("", calls=[GOOD])])
    with in_front_of(mock, operations=Operations(accounts)) as client:
        assert ask(client).status_code == 401
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
        headers = {"authorization": f"Bearer {secret}"}
        assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        (row,) = ledger.summary(["key"])
        assert row["completion_tokens"] == 2 * USAGE["completion_tokens"] and row["cost"] > 0
        much = client.post("/v1/chat/completions", json={**body, "max_tokens": 10**9}, headers=headers)
        assert much.status_code == 402


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_observed_is_counted_too(stream: bool, tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    operations = Operations(Accounts(ledger, tariff=Tariff(like="deepseek-v4-flash")))
    with in_front_of(MockUpstream([says("Hello.")]), "observe", operations=operations) as client:
        assert ask(client, stream=stream, stream_options={"include_usage": True}).status_code == 200
    operations.accounts._writer.shutdown()  # type: ignore[union-attr]
    (row,) = ledger.summary(["model"])
    assert (row["model"], row["completion_tokens"]) == ("m", USAGE["completion_tokens"]) and row["cost"] > 0
    ledger.close()
