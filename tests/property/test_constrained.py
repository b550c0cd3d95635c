"""Constrained decoding over random scores: whatever the model wants to say, a finished reply obeys."""

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import HashModel, byte_tokenizer
from small_models import build, config
from torch import Tensor

from rorqual import chat
from rorqual.engine import Completion, Engine, Grammar, SamplingParams
from rorqual.errors import RequestError

jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="needs a validator (clients extra)")
pytest.importorskip("llguidance", reason="needs llguidance (serve extra)")

TOKENIZER = byte_tokenizer()
THINK_END = TOKENIZER.token_id("</think>")
DSML = TOKENIZER.token_id("｜DSML｜")


class EagerModel(HashModel):
    """Random scores that favour what closes things, so that most replies come to an end."""

    def logits_after(self, ids: list[int]) -> Tensor:
        logits = super().logits_after(ids)
        logits[TOKENIZER.encode('<</"}]')] += 3.0
        logits[[DSML, THINK_END]] += 4.0
        logits[TOKENIZER.eos_token_id] = 2.0
        return logits


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine(EagerModel(), TOKENIZER) as engine:
        yield engine


def generate(engine: Engine, grammar: Grammar | None, seed: int, thinking: bool = False, **more: Any) -> Completion:
    suppressed = chat.suppressed_ids(TOKENIZER, thinking=thinking, tools=True)
    params = SamplingParams(seed=seed, max_tokens=600, grammar=grammar, suppress_token_ids=suppressed, **more)
    return engine.generate([[5 + seed % 200, 9]], params)[0]


def tool(name: str, parameters: Any, strict: bool = True) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


def an_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


keys = st.text("ab ç_-.", min_size=1, max_size=4)
texts = st.text('xy"<>&⟦⟧🐋 \n', max_size=5)
leaves = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "string", "pattern": "^[a-c]{1,4}(/x)?$"}),
    st.sampled_from(["uuid", "ipv4", "email"]).map(lambda name: {"type": "string", "format": name}),
    st.just({"type": "boolean"}),
    st.integers(-5, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 30}),
    st.lists(st.one_of(texts, st.integers(0, 9)), min_size=1, max_size=3, unique=True).map(lambda v: {"enum": v}),
    st.just({"type": ["string", "null"]}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items}),
        st.dictionaries(keys, inner, max_size=3).map(an_object),
        st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several}),
    ),
    max_leaves=4,
)


def read_calls(text: str, thinking_mode: str = "chat") -> list[tuple[str, Any]]:
    message = chat.parse_completion(text + "<｜end▁of▁sentence｜>", thinking_mode=thinking_mode)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


@pytest.mark.parametrize("examples", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_strict_calls_obey_their_schemas(engine: Engine, examples: int) -> None:
    finished = 0

    @settings(deadline=None, max_examples=examples)
    @given(
        st.lists(st.dictionaries(keys, schemas, max_size=3).map(an_object), min_size=1, max_size=2), st.integers(0, 99)
    )
    def check(parameters: list[Any], seed: int) -> None:
        nonlocal finished
        tools = [tool(f"tool_{i}", one) for i, one in enumerate(parameters)]
        lark = chat.reply_grammar(tools, forced=True)
        assert lark is not None
        done = generate(engine, Grammar(lark), seed)
        if done.finish_reason != "stop":
            return
        finished += 1
        calls = read_calls(done.text)
        assert calls
        for name, arguments in calls:
            [own] = [one["function"] for one in tools if one["function"]["name"] == name]
            jsonschema_rs.validate(own["parameters"], arguments)

    check()
    assert finished > examples // 3


@pytest.mark.parametrize("forced", [False, True, "b"])
@pytest.mark.parametrize("thinking", [pytest.param(False, marks=pytest.mark.slow), True])
def test_names_are_those_of_the_tools(engine: Engine, forced: Any, thinking: bool) -> None:
    """Also for tools that are not strict, and behind free reasoning."""
    tools = [tool("a", an_object({"x": {"type": "string"}})), tool("b", {"type": "object"}, strict=False)]
    lark = chat.reply_grammar(tools, forced=forced)
    assert lark is not None
    seen: list[str] = []
    for seed in range(12):
        done = generate(engine, Grammar(lark, "</think>" if thinking else None), seed, thinking)
        if done.finish_reason != "stop":
            continue
        assert (THINK_END in done.ids) == thinking
        text = TOKENIZER.decode(done.ids[:-1])
        if "｜DSML｜" in text or forced:
            calls = read_calls(text, "thinking" if thinking else "chat")
            seen += [name for name, _ in calls]
            assert calls
    assert bool(seen) >= bool(forced) and set(seen) <= ({"b"} if forced == "b" else {"a", "b"})


@pytest.mark.parametrize("with_tools", [False, True])
def test_json_content(engine: Engine, with_tools: bool) -> None:
    schema = an_object({"n": {"type": "integer"}, "s": {"type": "string"}})
    tools = [tool("a", an_object({}))] if with_tools else []
    for asked in ({"type": "object"}, schema):
        lark = chat.reply_grammar(tools, schema=asked)
        assert lark is not None
        contents = []
        for seed in range(12):
            done = generate(engine, Grammar(lark), seed)
            if done.finish_reason == "stop" and "｜DSML｜" not in done.text:
                contents.append(json.loads(done.text))
                jsonschema_rs.validate(asked, contents[-1])
        assert contents


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_neighbours_and_preemption_change_nothing(temperature: float) -> None:
    """The same tokens alone, beside others, with drafts right or wrong, and after the state was taken away."""
    model = build(config(vocab_size=TOKENIZER.vocab_size))
    lark = chat.reply_grammar([tool("a", an_object({"x": {"type": "integer"}}), strict=True)], forced=False)
    grammar = Grammar(str(lark))
    own = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=30, grammar=grammar if i % 2 else None)
        for i in range(8)
    ]
    prompts = [[7 + i, 9, 11] for i in range(8)]
    with Engine(model, TOKENIZER, max_running=1) as engine:
        alone = [done.ids for done in engine.generate(prompts, own)]
    assert len({tuple(ids) for ids in alone}) > 2
    with Engine(model, TOKENIZER) as engine:
        assert [done.ids for done in engine.generate(prompts, own)] == alone
    draw = random.Random(0)
    known = {tuple(prompt): ids for prompt, ids in zip(prompts, alone, strict=True)}

    def drafter(ids: Any, most: int) -> list[int]:
        rest = known[tuple(ids[:3])][len(ids) - 3 :]
        return [one if draw.random() < 0.7 else draw.randrange(3, 250) for one in rest[:most]]

    with Engine(model, TOKENIZER, speculate=drafter) as engine:
        assert [done.ids for done in engine.generate(prompts, own)] == alone
        assert engine.stats().accepted_tokens > 10
    with Engine(model, TOKENIZER, max_state_bytes=300_000) as engine:
        assert [done.ids for done in engine.generate(prompts, own)] == alone


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    lark = chat.reply_grammar([], schema={"type": "object"})
    done = generate(engine, Grammar(str(lark)), 3, logprobs=True, top_logprobs=1)
    logits = EagerModel().logits_after([5 + 3, 9])
    first = torch.log_softmax(logits, -1)[done.ids[0]]
    assert done.logprobs is not None and done.logprobs[0] == pytest.approx(float(first), abs=1e-5)


@pytest.mark.parametrize(
    "schema",
    [{"type": "string", "pattern": "(?=a)b"}, {"$ref": "#/nowhere"}, {"type": "strin"}, {"enum": ["x" * 2_000_000]}],
)
def test_what_cannot_be_matched_is_refused(engine: Engine, schema: Any) -> None:
    lark = chat.reply_grammar([], schema=schema)
    with pytest.raises(RequestError, match="cannot be held to what response_format asks for") as refusal:
        generate(engine, Grammar(str(lark), param="response_format"), 0)
    assert refusal.value.param == "response_format"
    assert generate(engine, None, 0).ids


@pytest.mark.parametrize(
    ("parameters", "where", "fix"),
    [
        ({"type": "array"}, "tools[0].function.parameters", "object schema"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, ".required", "leaves out a"),
        ({"type": "object", "properties": {}}, ".additionalProperties", "is not false"),
        (an_object({"a": {"type": "string", "minLength": 2}}), ".properties.a.minLength", "not supported"),
        (an_object({"a": {"type": "array", "items": {"type": "text"}}}), ".properties.a.items.type", "'text'"),
        (an_object({"a": {}}), ".properties.a", "has no type"),
        (an_object({"a": {"$ref": "#/$defs/b"}}), ".properties.a.$ref", "nothing"),
        (an_object({"a": {"type": "string", "format": "date"}}), ".format", "'date'"),
        ({**an_object({"a": {"$ref": "#/$defs/b"}}), "$defs": {"b": {"$ref": "#/$defs/b"}}}, "$ref", "#/$defs/b"),
    ],
)
def test_schemas_that_strict_mode_does_not_take(parameters: Any, where: str, fix: str) -> None:
    with pytest.raises(RequestError, match="could not be held") as refusal:
        chat.reply_grammar([tool("a", parameters)], forced=True)
    assert where in str(refusal.value.param) and fix in str(refusal.value)
