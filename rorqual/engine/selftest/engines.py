"""Checks of whole engines: greedy requests in company, cancelled neighbours, restarts, and a control that must fail."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rorqual.engine.engine import Engine
from rorqual.engine.params import SamplingParams
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.engine.selftest.report import Check
from rorqual.engine.selftest.subject import IdsOnly, plain_ids
from rorqual.model import Transformer
from rorqual.ops import registry

CONTROL_REQUESTS, CONTROL_TOKENS = 12, 32


def make_prompts(model: Transformer, count: int, seed: int, longest: int = 200) -> list[list[int]]:
    """Prompts of random lengths that share beginnings; every fifth comes twice."""
    draw = random.Random(seed)
    vocab = model.cfg.vocab_size
    stem = [draw.randrange(vocab) for _ in range(longest)]
    out: list[list[int]] = []
    for number in range(count):
        own = [draw.randrange(vocab) for _ in range(draw.randrange(1, 20))]
        out.append(out[-1] if number % 5 == 4 else stem[: draw.randrange(longest)] + own)
    return out


def schedules(model: Transformer, check: Check, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Requests in engines of two setups over one disk cache, neighbours cancelled on the way; returns the truth."""
    prompts = make_prompts(model, count, seed)
    truth = [plain_ids(model, prompt, tokens) for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        for number, (running, chunk) in enumerate(((6, 48), (3, 200))):
            cache = PrefixCache(model, folder=Path(folder), memory_bytes=8 << 20, running_tokens=16 * 1024)
            tokenizer = IdsOnly(model.cfg.vocab_size)
            with Engine(model, tokenizer, max_running=running, chunk=chunk, prefix_cache=cache) as engine:
                requests = []
                for place, prompt in enumerate(prompts):
                    requests.append(engine.submit(prompt, greedy, wait=True))
                    if place % 4 == number:
                        engine.submit(prompts[-1 - place] + [1], greedy, wait=True).cancel()
                outs = [request.result(600) for request in requests]
            cache.close()
            for place, (out, wanted) in enumerate(zip(outs, truth, strict=True)):
                where = f"request {place} of {len(prompts[place])} tokens, engine {number}"
                check.same_ids(list(out.ids), wanted, where)
    hits = sum(out.usage.cached_tokens for out in outs)
    check.note = f"{2 * count} requests of {tokens} tokens; {hits} prompt tokens cached after the restart"
    return truth


def drafts(model: Transformer, check: Check, count: int, tokens: int, seed: int) -> None:
    """Engines that verify drafts: right ones up to a random place, then wrong ones; by turns with the model's own."""
    prompts = make_prompts(model, count, seed + 1)
    truth = [plain_ids(model, prompt, tokens) for prompt in prompts]
    texts = [prompt + ids for prompt, ids in zip(prompts, truth, strict=True)]
    draw, drafted, vocab = random.Random(seed), 0, model.cfg.vocab_size

    def guess(known: Sequence[int], most: int) -> list[int]:
        text = next((one for one in texts if one[: len(known)] == list(known)), [])
        right = text[len(known) : len(known) + draw.randrange(most + 1)]
        return right + [draw.randrange(vocab) for _ in range(most - len(right))]

    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    for own in (guess, True if len(model.mtp) else guess):
        with Engine(model, IdsOnly(vocab), max_running=4, chunk=64, speculate=own) as engine:
            outs = engine.generate(prompts, greedy)
        for place, (out, wanted) in enumerate(zip(outs, truth, strict=True)):
            drafted += out.usage.drafted_tokens
            check.same_ids(list(out.ids), wanted, f"request {place} of {len(prompts[place])} tokens, with drafts")
    check.note = f"{drafted} tokens were drafted"


def control(model: Transformer) -> Check:
    """The same comparison with the C operations off: it should find differences, or it could not have found any."""
    check = Check("control", "the engine with torch's own products instead, against the plain model with them")
    prompts = make_prompts(model, CONTROL_REQUESTS, 77, 60)
    greedy = SamplingParams(temperature=0, max_tokens=CONTROL_TOKENS)
    with registry.only("reference"):
        truth = [plain_ids(model, prompt, CONTROL_TOKENS) for prompt in prompts]
        with Engine(model, IdsOnly(model.cfg.vocab_size), max_running=CONTROL_REQUESTS, chunk=64) as engine:
            outs = engine.generate(prompts, greedy)
    for place, (out, wanted) in enumerate(zip(outs, truth, strict=True)):
        check.same_ids(list(out.ids), wanted, f"request {place}")
    return check
