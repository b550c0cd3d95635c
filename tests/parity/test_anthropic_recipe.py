"""The Anthropic dialect against DeepSeek's own (`deepseek-recipe`): requests into prompts, and replies into events.

Shows: for what both take, the same prompt and switches, and a stream of the same events with the same blocks.
Left out, because the two differ on purpose: results that come after text in their message and tools of type `custom`
are taken here; images and documents are refused here rather than replaced by a remark; an account line is also left out
of a system text that is no list of blocks; `any` forces a call; a call that is cut off is no block of
the whole answer, and complete calls before the cut are made (`tool_use`). The recipe leaves a newline behind text that
ends in `<` before calls, drops newlines at the end of thinking, splits arguments into other pieces, and has `xhigh` as
a level of its own.
"""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages_stream import check_stream

from rorqual import chat
from rorqual.server.anthropic.convert import to_chat
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.anthropic.writer import Writer

recipe = pytest.importorskip("deepseek_recipe", reason="deepseek-recipe is not installed (a test-only oracle)")
OPTIONS = recipe.ConversionOptions().with_model_alias("m", recipe.ModelVersion.DeepseekV4Pro)

texts = st.text(st.sampled_from('ab \n"\\é🐋<>｜&{'), min_size=1, max_size=8).filter(
    lambda text: not text.startswith("\n")
)
names = st.sampled_from(["run", "read_file", "x-y"])
scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from([0.5, -1.25]) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2))
MARK: Any = {"cache_control": {"type": "ephemeral"}}


def block(**fields: Any) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fields.items()}
    )


text_blocks = block(type="text", text=texts) | block(type="text", text=texts, **MARK)
contents = texts | st.lists(text_blocks, min_size=1, max_size=3)
tools = st.lists(
    block(name=names, description=texts, input_schema={"type": "object", "additionalProperties": False})
    | block(name=names, input_schema={"type": "object"}, strict=True, **MARK),
    max_size=2,
    unique_by=lambda tool: tool["name"],
)


@st.composite
def conversations(draw: Any) -> list[Any]:
    """User turns, perhaps with reminders of the system, assistant turns with and without calls; a question last."""
    messages: list[Any] = []
    for turn in range(draw(st.integers(1, 3))):
        if turn:
            thought = draw(st.lists(block(type="thinking", thinking=texts, signature="s"), max_size=2))
            said = (
                draw(texts)
                if not thought and draw(st.booleans())
                else thought + draw(st.lists(text_blocks, min_size=1))
            )
            messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": draw(contents)})
        for step in range(draw(st.integers(0, 2))):
            ids = [f"c{turn}{step}{i}" for i in range(draw(st.integers(1, 3)))]
            arguments = st.dictionaries(names, values, min_size=1, max_size=2)
            calls = [draw(block(type="tool_use", id=i, name=names, input=arguments)) for i in ids]
            thought = draw(st.lists(block(type="thinking", thinking=texts, signature="s"), max_size=1))
            messages.append({"role": "assistant", "content": thought + draw(st.lists(text_blocks, max_size=1)) + calls})
            found = st.none() | contents
            results = [
                {"type": "tool_result", "tool_use_id": i, "content": draw(found), "is_error": draw(st.booleans())}
                for i in draw(st.permutations(ids))
            ]
            messages.append({"role": "user", "content": results + draw(st.lists(text_blocks, max_size=2))})
        if draw(st.integers(0, 3)) == 0:
            messages.append({"role": "system", "content": draw(contents)})
    return messages


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    messages=conversations(),
    system=st.none() | texts | st.lists(text_blocks, min_size=1, max_size=3),
    is_billed=st.booleans(),
    functions=tools,
    thinking=st.sampled_from([None, "enabled", "adaptive", "disabled"]),
    effort=st.sampled_from([None, "none", "minimal", "low", "medium", "high", "max"]),
    choice=st.sampled_from([None, "auto", "none"]),
)
def test_requests_become_the_same_prompt(
    messages: Any, system: Any, is_billed: bool, functions: Any, thinking: Any, effort: Any, choice: Any
) -> None:
    if is_billed and isinstance(system, list):
        system = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=fa690;"}, *system]
    fields = {
        "system": system,
        "tools": functions,
        "thinking": thinking and {"type": thinking, "budget_tokens": 1024},
        "output_config": effort and {"effort": effort},
        "tool_choice": choice and {"type": choice},
    }
    body = {"model": "m", "max_tokens": 100, "messages": messages, **{k: v for k, v in fields.items() if v is not None}}
    conversation = recipe.MessagesRequest(json.dumps(body)).convert(OPTIONS).conversation
    expected = recipe.DeepseekV4Encoding().render_conversation(conversation).prompt

    ours = to_chat(MessagesRequest.model_validate(body), True)
    mode, level = chat.resolve_effort(ours.reasoning_effort, "2026-07")
    if ours.thinking is not None and ours.thinking.type == "disabled":
        mode, level = "chat", None
    shown = None if ours.tool_choice == "none" else ours.tools
    assert conversation.thinking_mode is (mode == "thinking")
    plain = [message.model_dump(exclude_none=True) for message in ours.messages]
    assert chat.encode_messages(plain, shown, mode, level, revision="2026-07") == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "developer", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "search_result", "source": "u"}]}]},
        {"thinking": {"type": "auto"}},
        {"thinking": {}},
        {"max_tokens": 0},
        {"temperature": 3},
        {"stop_sequences": ["a"] * 17},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "f"}]},
        {"tools": [{"name": "a b", "input_schema": {"type": "object"}}]},
        {"tools": [{"name": "f" * 129, "input_schema": {"type": "object"}}]},
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}] * 2},
    ],
)
def test_what_it_refuses_is_refused_here(fields: Any, client: Any) -> None:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], **fields}
    with pytest.raises((recipe.ConversionError, ValueError)):
        recipe.MessagesRequest(json.dumps(body)).convert(OPTIONS)
    assert client.post("/anthropic/v1/messages", json={**body, "model": "minke"}).status_code == 400


@pytest.fixture(scope="module")
def client() -> Any:
    from mock_model import ScriptModel, byte_tokenizer
    from starlette.testclient import TestClient

    from rorqual.engine import Engine
    from rorqual.server import create_app

    with Engine(ScriptModel(lambda prompt: "no"), byte_tokenizer()) as engine:
        yield TestClient(create_app(engine, "minke"))


CALL = (
    '<｜DSML｜invoke name="{}">\n<｜DSML｜parameter name="a" string="true">{}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="false">{}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
plain = st.text(st.sampled_from('ab \n"\\é🐋<>'), max_size=8).filter(lambda text: not text.startswith("\n"))
calls = st.lists(st.tuples(names, plain, values.map(lambda value: json.dumps(value, ensure_ascii=False))), max_size=2)


@settings(max_examples=150, deadline=None)
@given(
    reasoning=st.none() | plain.map(str.strip),
    answer=plain.map(lambda text: text.rstrip("<\n ")),
    made=calls,
    size=st.integers(1, 9),
    ends=st.sampled_from(["stop", "length"]),
)
def test_replies_become_the_same_blocks(reasoning: Any, answer: str, made: Any, size: int, ends: str) -> None:
    text = answer if reasoning is None else f"{reasoning}</think>{answer}"
    if made:
        ends = "stop"
        text += "\n\n<｜DSML｜tool_calls>\n" + "".join(CALL.format(*call) for call in made) + "</｜DSML｜tool_calls>"
    thinking = reasoning is not None
    pieces = [text[i : i + size] for i in range(0, len(text), size)]

    stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    processor = recipe.StreamProcessor(
        recipe.MessagesChunkGenerator("ID", "m", thinking), recipe.ParsingOptions(thinking_initial_stage=stage)
    )
    theirs = processor.push(recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage(prompt_tokens=9)))
    for piece in pieces:
        theirs += processor.push(recipe.InferenceChunk.text(piece, 1))
    reason = recipe.InferenceFinishReason.Stop if ends == "stop" else recipe.InferenceFinishReason.Length
    theirs += processor.push(recipe.InferenceChunk.finish(reason)) + processor.finish()
    expected = check_stream([json.loads(event.to_json()) for event in theirs])

    parser, writer = chat.StreamParser("thinking" if thinking else "chat"), Writer("ID", thinking=thinking)
    read = [event for piece in pieces for event in parser.feed(piece)] + parser.finish(ends)
    events = [*writer.begin(), *(event for one in read for event in writer.read(one))]
    usage = {"output_tokens": 0}
    start = {**expected, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    end = {"stop_reason": reasons[parser.result.finish_reason], "stop_sequence": None}
    ours = check_stream(
        [
            {"type": "message_start", "message": start},
            *events,
            {"type": "message_delta", "delta": end, "usage": usage},
            {"type": "message_stop"},
        ]
    )
    assert (comparable(ours["content"]), ours["stop_reason"]) == (
        comparable(expected["content"]),
        expected["stop_reason"],
    )
    assert comparable(writer.content) == comparable(expected["content"])


def comparable(content: Any) -> list[Any]:
    """Blocks without ids, arguments as values."""
    out = [{name: value for name, value in one.items() if name != "id"} for one in content]
    for one in out:
        if isinstance(one.get("input"), str):
            one["input"] = json.loads(one["input"])
    return out
