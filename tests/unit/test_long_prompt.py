"""Long prompts in the engine: chunks, progress, one row of logits, and the limit of the model's positions."""

from typing import Any

import pytest
import torch
from mock_model import byte_tokenizer
from small_models import build, config

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import RequestError
from rorqual.model import Scores

TOKENIZER = byte_tokenizer()
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def test_a_long_prompt_is_read_in_chunks_and_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(config(vocab_size=TOKENIZER.vocab_size))
    prompt = torch.randint(3, 200, (1100,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = int(model(torch.tensor([prompt]))[0, -1, : TOKENIZER.vocab_size].argmax())
    steps: list[int] = []
    rows: list[int] = []
    told: list[tuple[int, int]] = []
    next_scores = model.next_scores

    def counted(segments: list, *rest: Any) -> Scores:  # type: ignore[type-arg]
        steps.append(sum(len(one.tokens) for one in segments))
        scores = next_scores(segments, *rest)
        rows.append(scores.logits.shape[1])
        return scores

    monkeypatch.setattr(model, "next_scores", counted)
    with Engine(model, TOKENIZER, chunk=256) as engine:
        done = engine.submit(prompt, GREEDY, on_progress=lambda *now: told.append(now)).result(300)
    assert done.ids == (expected,)
    assert steps == [256, 256, 256, 256, 76]
    assert rows == [0, 0, 0, 0, 1]
    assert told == [(256, 1100), (512, 1100), (768, 1100), (1024, 1100), (1100, 1100)]


def test_a_prompt_beyond_the_positions_is_refused_with_both_numbers() -> None:
    model = build(config(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=128))
    with Engine(model, TOKENIZER) as engine:
        with pytest.raises(RequestError, match="maximum context length is 128 tokens.*131 tokens.*130 in the messages"):
            engine.submit([5] * 130, GREEDY)
        assert engine.submit([5] * 127, GREEDY).result(300).usage.prompt_tokens == 127
