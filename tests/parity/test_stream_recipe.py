"""Our stream parser against DeepSeek's own (`deepseek-recipe`), reply by reply, each cut at random by both.

Shows: the same reasoning, content, calls and finish reason, with and without thinking and tools. Left out: newlines
around reasoning and at the end of text before calls, which the recipe drops (one of the two before the block stays
when the text ends like the beginning of a tag, in `<` or `<｜`), and replies that were cut off, where it leaves pieces
of tags in the text and calls without their end.
"""

import json
import os
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual import chat

recipe = pytest.importorskip("deepseek_recipe", reason="deepseek-recipe is not installed (a test-only oracle)")

NUM_REPLIES = int(os.environ.get("RORQUAL_TEST_EXAMPLES", "500"))

names = st.sampled_from(["run", "read_file", "x-y", "é"])
plain = st.text(st.sampled_from('ab \n"\\é🐋<>/｜&{}'), max_size=12).map(lambda text: text.strip("\n <"))
plain = plain.filter(lambda text: not text.endswith("<｜"))
scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from([0.5, -1.25]) | plain
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2))
parameters = st.lists(st.tuples(names, st.one_of(plain.map(lambda t: (t, True)), values.map(lambda v: (v, False)))),
                      max_size=3, unique_by=lambda one: one[0])  # fmt: skip
calls = st.lists(st.tuples(names, parameters), max_size=3)


def written(call: Any) -> str:
    name, given = call
    lines = [
        f'<｜DSML｜parameter name="{key}" string="{"true" if is_text else "false"}">'
        f"{value if is_text else json.dumps(value, ensure_ascii=False)}</｜DSML｜parameter>\n"
        for key, (value, is_text) in given
    ]
    return f'<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n'


def cuts(text: str, draw: random.Random) -> list[str]:
    pieces = []
    while text:
        size = draw.choice([1, 1, 2, 3, 5, 8, 40])
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def theirs(pieces: list[str], thinking: bool, ends: str) -> Any:
    stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    body["thinking"] = {"type": "enabled" if thinking else "disabled"}
    options = recipe.ConversionOptions().with_model_alias("m", recipe.ModelVersion.DeepseekV4Pro)
    request = recipe.ChatCompletionRequest(json.dumps(body)).convert(options)
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "ID", "m")
    processor = recipe.StreamProcessor(generator, recipe.ParsingOptions(thinking_initial_stage=stage))
    chunks = processor.push(recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage(prompt_tokens=9)))
    for piece in pieces:
        chunks += processor.push(recipe.InferenceChunk.text(piece, 1))
    reason = recipe.InferenceFinishReason.Stop if ends == "stop" else recipe.InferenceFinishReason.Length
    chunks += processor.push(recipe.InferenceChunk.finish(reason)) + processor.finish()
    content, reasoning, made, finish = "", "", {}, None
    for chunk in chunks:
        for choice in json.loads(chunk.to_json())["choices"]:
            delta = choice["delta"]
            content += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or ""
            finish = choice.get("finish_reason") or finish
            for call in delta.get("tool_calls") or []:
                own = made.setdefault(call["index"], ["", ""])
                own[0] += call["function"].get("name") or ""
                own[1] += call["function"].get("arguments") or ""
    return reasoning, content, [(name, json.loads(text)) for name, text in made.values()], finish


def ours(pieces: list[str], thinking: bool, ends: str) -> Any:
    parser = chat.StreamParser("thinking" if thinking else "chat")
    for piece in pieces:
        parser.feed(piece)
    parser.finish(ends)
    message = parser.result.message
    made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    return message["reasoning_content"], message["content"], made, parser.result.finish_reason


@settings(max_examples=NUM_REPLIES, deadline=None)
@given(st.none() | plain, plain, calls, st.randoms(use_true_random=False))
def test_replies_are_read_alike(reasoning: Any, answer: str, made: Any, draw: random.Random) -> None:
    text = answer if reasoning is None else f"{reasoning}</think>{answer}"
    if made:
        text += "\n\n<｜DSML｜tool_calls>\n" + "".join(map(written, made)) + "</｜DSML｜tool_calls>"
    thinking = reasoning is not None
    expected = theirs(cuts(text, draw), thinking, "stop")
    assert ours(cuts(text, draw), thinking, "stop") == expected
