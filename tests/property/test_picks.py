"""Picks found by running an answer again are those of one full pass, and of the steps that wrote it."""

import random
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import HashModel, byte_tokenizer
from small_models import build, config

from rorqual.engine import Engine, SamplingParams, sampler
from rorqual.engine.picks import MOST_BLOCKS, MOST_ROWS, MOST_TOKENS, Picks, check_picks, find_picks
from rorqual.errors import RequestError
from rorqual.model import Trace, Transformer

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Window, CSA, HCA, CSA; four entries of a choice."""
    return build(config(vocab_size=TOKENIZER.vocab_size, compress_ratios=[0, 4, 8, 4], index_topk=4))


def run(work: Generator[None, None, Picks]) -> Picks:
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Picks = end.value
            return found


def by_one_pass(model: Transformer, prompt: list[int], output: list[int], like: Picks) -> dict[int, torch.Tensor]:
    """The same counts from a pass over everything at once, entry by entry."""
    names = {layer.layer: f"layers.{layer.layer}.attn.index_topk" for layer in like.layers}
    trace = Trace(capture=list(names.values()))
    with torch.inference_mode():
        model.forward_streams(torch.tensor([[*prompt, *output]]), trace=trace)
    found = {}
    for layer in like.layers:
        counts = torch.zeros(like.num_rows, like.num_blocks, dtype=torch.int64)
        for i in range(len(output)):
            for entry in trace.captured[names[layer.layer]][0, len(prompt) + i - 1].tolist():
                if entry >= 0:
                    counts[i // like.row_tokens, entry * layer.entry_tokens // like.block_tokens] += 1
        found[layer.layer] = counts
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(1, 130), st.integers(0, 2**16))
def test_they_are_those_of_one_pass(model: Transformer, num_prompt: int, num_output: int, seed: int) -> None:
    draw = random.Random(seed)
    prompt, output = ([draw.randrange(3, 259) for _ in range(n)] for n in (num_prompt, num_output))
    with torch.inference_mode():
        found = run(find_picks(model, prompt, output))
    assert found.num_rows <= MOST_ROWS and found.num_blocks <= MOST_BLOCKS
    assert (found.num_rows - 1) * found.row_tokens < num_output <= found.num_rows * found.row_tokens
    expected = by_one_pass(model, prompt, output, found)
    for layer in found.layers:
        assert torch.equal(layer.picked, expected[layer.layer])
        assert (layer.picked <= layer.seen).all()
        # a query at position p sees (p + 1) // 4 entries and picks four of them, or all
        seen = torch.tensor([(num_prompt + i) // layer.entry_tokens for i in range(num_output)])
        assert int(layer.seen.sum()) == int(seen.sum())
        assert int(layer.picked.sum()) == int(seen.clamp_max(4).sum())


def test_the_second_run_is_the_first(model: Transformer) -> None:
    """The run that looks back gives the very scores of the steps that wrote the answer, so its picks are theirs."""
    prompt = [random.Random(5).randrange(3, 259) for _ in range(90)]
    with Engine(model, TOKENIZER) as engine:
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, logprobs=True, top_logprobs=5)
        done = engine.submit(prompt, params).result(60)
        picks = engine.aside(find_picks(model, prompt, done.ids)).result(60)
    assert picks.output_tokens == len(done.ids)
    names = [f"layers.{layer.layer}.attn.index_topk" for layer in picks.layers]
    with torch.inference_mode():
        state = model.new_state(1)
        model.forward(torch.tensor([prompt[:-1]]), state=state)
        queries = torch.tensor([[prompt[-1], *done.ids[:-1]]])
        logits = model.forward(queries, state=state, trace=Trace(capture=names))[0, :, : TOKENIZER.vocab_size]
    scores = sampler.log_probabilities(logits)
    assert done.logprobs is not None
    assert tuple(float(row[token]) for row, token in zip(scores, done.ids, strict=True)) == done.logprobs
    assert done.exactness is not None and done.exactness.level == "bitwise"


@pytest.mark.parametrize(
    ("foreign", "num_prompt", "num_output", "words"),
    [(True, 5, 5, "no lightning indexer"), (False, 5, 0, "no token"), (False, MOST_TOKENS, 1, "32,769 tokens")],
)
def test_what_cannot_be_shown_says_why(
    model: Transformer, foreign: bool, num_prompt: int, num_output: int, words: str
) -> None:
    asked: Any = HashModel() if foreign else model
    with pytest.raises(RequestError, match=words):
        check_picks(asked, num_prompt, num_output)
