"""An engine with a prefix cache on tiny random networks: each request gets the tokens it would have got alone."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mock_model import byte_tokenizer
from plain_generation import alone
from small_models import build, config

from rorqual.engine import Completion, Engine, SamplingParams
from rorqual.engine.memory import PagedCost
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()
PATIENCE_S = 300


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Window, CSA, HCA, CSA."""
    return build(config(vocab_size=TOKENIZER.vocab_size))


def new_cache(model: Transformer, **options: Any) -> PrefixCache:
    return PrefixCache(model, **{"memory_bytes": 1 << 22, "running_tokens": 4096, "page_tokens": 8, **options})


def family(count: int, seed: int) -> list[list[int]]:
    """Prompts that share beginnings of all lengths, some of them twice."""
    draw = random.Random(seed)
    stem = [draw.randrange(3, 259) for _ in range(90)]
    out: list[list[int]] = []
    for _ in range(count):
        if out and draw.random() < 0.25:
            out.append(out[draw.randrange(len(out))])
        else:
            own = [draw.randrange(3, 259) for _ in range(draw.randrange(1, 12))]
            out.append(stem[: draw.randrange(90)] + own)
    return out


def run(engine: Engine, prompts: list[list[int]], max_tokens: int = 6) -> list[Completion]:
    own = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=max_tokens) for i in range(len(prompts))]
    requests = [engine.submit(ids, one, wait=True) for ids, one in zip(prompts, own, strict=True)]
    return [request.result(PATIENCE_S) for request in requests]


def expected(model: Transformer, prompts: list[list[int]], max_tokens: int = 6) -> list[list[int]]:
    own = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=max_tokens) for i in range(len(prompts))]
    return [alone(model, ids, one, TOKENIZER.eos_token_id) for ids, one in zip(prompts, own, strict=True)]


@pytest.mark.parametrize("windows", ["full", "periodic", "zero"])
def test_prompts_that_share_beginnings(model: Transformer, windows: Any) -> None:
    prompts = family(14, 3)
    cache = new_cache(model, windows=windows)
    with Engine(model, TOKENIZER, max_running=4, chunk=16, prefix_cache=cache) as engine:
        outs = run(engine, prompts)
        stats = engine.stats()
    assert [list(out.ids) for out in outs] == expected(model, prompts)
    cached = sum(out.usage.cached_tokens for out in outs)
    assert 0 < cached == cache.stats.cached_tokens
    assert stats.prompt_tokens == sum(map(len, prompts)) - cached, "what was cached was not run"
    assert cache.stats.hits > 5 and cache.stats.reasons["exact repeat"] > 0


def test_a_restart_and_a_tiny_memory(model: Transformer, tmp_path: Path) -> None:
    prompts = family(12, 5)
    for memory in (1 << 22, 20_000):
        cache = new_cache(model, folder=tmp_path, memory_bytes=memory)
        with Engine(model, TOKENIZER, max_running=3, chunk=16, prefix_cache=cache) as engine:
            outs = run(engine, prompts)
        cache.close()
        assert [list(out.ids) for out in outs] == expected(model, prompts)
    assert cache.stats.disk_tokens > 100 and cache.tree.nbytes <= 20_000


def test_an_exact_repeat_makes_no_step_before_its_first_token(model: Transformer) -> None:
    cache = new_cache(model)
    [prompt] = family(1, 9)
    with Engine(model, TOKENIZER, chunk=16, prefix_cache=cache, log_steps=8) as engine:
        first = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1))[0]
        again = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=True))[0]
    assert engine.step_log()[-1].prompt_tokens == 0
    assert first.ids == again.ids and again.usage.cached_tokens == len(prompt)


def test_an_exact_repeat_has_the_same_scores_in_bf16(tmp_path: Path) -> None:
    """The stored hidden state meets the output head in the precision that it was computed in."""
    model = build(config(vocab_size=TOKENIZER.vocab_size)).to(torch.bfloat16)
    [prompt] = family(1, 9)
    own = SamplingParams(temperature=0, max_tokens=3, logprobs=True, top_logprobs=20)
    outs = []
    for _ in range(2):  # the second time from disk
        cache = new_cache(model, folder=tmp_path)
        with Engine(model, TOKENIZER, chunk=16, prefix_cache=cache) as engine:
            outs += [engine.generate(prompt, own)[0] for _ in range(2)]
        cache.close()
    assert [out.usage.cached_tokens for out in outs] == [0, *[len(prompt)] * 3]
    assert all(out.top_logprobs == outs[0].top_logprobs for out in outs)


def test_prompt_scores_are_those_without_a_cache(model: Transformer) -> None:
    cache = new_cache(model)
    [prompt] = family(1, 11)
    own = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=True, top_logprobs=2)
    with Engine(model, TOKENIZER, chunk=16, prefix_cache=cache) as engine:
        [first], [again] = engine.generate([prompt], own), engine.generate([prompt], own)
        request = engine.submit(prompt, own)
        request.result(PATIENCE_S)
    assert first.prompt_scores == again.prompt_scores and again.usage.cached_tokens == 0
    assert request.cache is not None and request.cache.reason == "not asked"


def test_a_failed_step_and_cancelled_requests_leave_the_store_sound(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = family(10, 13)
    cache = new_cache(model)
    real, calls = Transformer.next_scores, [0]

    def sometimes(self: Transformer, segments: Any, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] in (3, 9) and len(segments) > 1:
            raise RuntimeError("a step that fails")
        return real(self, segments, *rest)

    monkeypatch.setattr(Transformer, "next_scores", sometimes)
    with Engine(model, TOKENIZER, max_running=4, chunk=16, prefix_cache=cache) as engine:
        doomed = [engine.submit(ids, SamplingParams(max_tokens=40), wait=True) for ids in prompts[:3]]
        doomed[1].cancel()
        outs = run(engine, prompts)
    assert [list(out.ids) for out in outs] == expected(model, prompts)


def test_a_conversation_sent_back_as_text(tmp_path: Path) -> None:
    """Sampled ids are seldom those of the tokenizer; the turn comes back as text and everything before it hits."""
    tokenizer: Tokenizer = train_tokenizer(["the cat sat on the mat; unable, stable tables " * 30], 300)
    model = build(config(vocab_size=tokenizer.vocab_size, index_topk=8))
    for start in range(2):
        cache = new_cache(model, folder=tmp_path, tokenizer=tokenizer)
        text = "<｜User｜>where is the cat today?<｜Assistant｜></think>"
        hits, read = [], 0
        with Engine(model, tokenizer, chunk=16, prefix_cache=cache) as engine:
            for turn in range(3):
                ids = tokenizer.encode(text)
                own = SamplingParams(
                    seed=turn, max_tokens=20, temperature=1.0, suppress_token_ids=all_but(tokenizer, b"the cats")
                )  # fmt: skip
                request = engine.submit(ids, own, rendered=True)
                out = request.result(PATIENCE_S)
                expected = len(request.prompt_ids) if start else read  # after the restart each is an exact repeat
                hits.append(out.usage.cached_tokens == expected)
                assert tokenizer.decode(request.prompt_ids) == text
                read = len(request.prompt_ids) + len(out.ids) - 1
                text += out.text + f"<｜User｜>on {turn}<｜Assistant｜></think>"
        cache.close()
        assert cache.turns is not None and len(cache.turns) == 3
        assert all(hits), "the whole sampled turn was there"


def all_but(tokenizer: Tokenizer, letters: bytes) -> tuple[int, ...]:
    """Ids of everything but these letters, so that what is sampled is spelled where the tokenizer would merge."""
    return tuple(
        i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) not in {bytes([b]) for b in letters}
    )


def test_a_cache_belongs_to_its_model(model: Transformer) -> None:
    cache = new_cache(build(config(vocab_size=TOKENIZER.vocab_size), 1))
    with pytest.raises(ConfigError, match="was made for another model"):
        Engine(model, TOKENIZER, prefix_cache=cache)
    with pytest.raises(ConfigError, match="must be a multiple of the page's 8 tokens"):
        new_cache(model, windows="periodic", period=12)
    with pytest.raises(ConfigError, match="which has none"):
        new_cache(model, period=16)


def test_a_budget_counts_what_requests_share_once(model: Transformer) -> None:
    endless = (TOKENIZER.eos_token_id,)
    draw = random.Random(1)
    stem = [draw.randrange(3, 259) for _ in range(240)]
    prompts = [[*stem, *(draw.randrange(3, 259) for _ in range(5))] for _ in range(6)]
    own = SamplingParams(temperature=0, max_tokens=20, suppress_token_ids=endless)
    cache = new_cache(model)
    cost, page = PagedCost(cache), cache.pool.page_bytes
    alone_bytes = cost(245 + 20)
    budget = alone_bytes + 5 * (cost(1) + 10 * page)  # one whole state, and what each more has for itself
    assert budget < 6 * cost(246), "six that share nothing would not fit, even before they say anything"
    with Engine(
        model, TOKENIZER, max_running=6, chunk=64, prefix_cache=cache, max_state_bytes=budget, log_steps=10_000
    ) as engine:
        engine.submit(prompts[0], own).result(PATIENCE_S)
        requests = [engine.submit(ids, own) for ids in prompts]
        outs = [request.result(PATIENCE_S) for request in requests]
        steps = engine.step_log()
        assert engine.stats().preemptions == 0
    assert max(step.running for step in steps) == 6, "they ran together"
    assert max(step.charged_bytes for step in steps) <= budget
    assert [list(out.ids) for out in outs] == [alone(model, ids, own, TOKENIZER.eos_token_id) for ids in prompts]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_budget_with_a_cache_is_kept(model: Transformer, seed: int) -> None:
    prompts, own = family(10, seed), SamplingParams(temperature=0, max_tokens=40, seed=seed)
    cache = new_cache(model, memory_bytes=1 << 16)
    cost, page = PagedCost(cache), cache.pool.page_bytes
    budget = 2 * cost(110)
    with Engine(
        model, TOKENIZER, max_running=5, chunk=16, prefix_cache=cache, max_state_bytes=budget, log_steps=10_000
    ) as engine:
        requests = [engine.submit(ids, own) for ids in prompts]
        while not all(request.finished for request in requests):
            assert cache.pool.num_in_use * page <= budget
            time.sleep(0.002)
        outs = [request.result(PATIENCE_S) for request in requests]
        steps = engine.step_log()
    assert max(step.charged_bytes for step in steps) <= budget
    assert [list(out.ids) for out in outs] == [alone(model, ids, own, TOKENIZER.eos_token_id) for ids in prompts]
    cache.clear()
    assert cache.pool.num_in_use == 0 and cache.pool.num_free == cache.pool.num_pages


@pytest.mark.parametrize("on_disk", [False, True])
def test_scopes_share_nothing(model: Transformer, tmp_path: Path, on_disk: bool) -> None:
    """Neither pages nor checkpoints nor sampled turns of one scope serve another, here or after a restart."""
    prompt = [random.Random(7).randrange(3, 259) for _ in range(60)]
    own = SamplingParams(temperature=0, max_tokens=12)
    folder = tmp_path if on_disk else None
    cached: dict[str, list[int]] = {}
    for _ in range(2):
        cache = new_cache(model, folder=folder, tokenizer=TOKENIZER)
        with Engine(model, TOKENIZER, prefix_cache=cache) as engine:
            for scope in ("", "a", "b", "a", "", "b"):
                request = engine.submit(prompt, own, cache_scope=scope, rendered=True)
                request.result(PATIENCE_S)
                cached.setdefault(scope, []).append(request.usage.cached_tokens)
        cache.close()
    first, again = 0, len(prompt)
    restarted = again if on_disk else first
    assert cached == {scope: [first, again, restarted, again] for scope in ("", "a", "b")}


def test_many_scopes_are_forgotten_once_they_hold_nothing(model: Transformer) -> None:
    cache = new_cache(model)
    kept = cache.tree.root_of("kept")
    lease = cache.begin([5] * 20, scope="kept")
    model(torch.tensor([[5] * 20]), state=lease.state)
    cache.end_of_output(lease)
    for i in range(10_000):
        cache.tree.root_of(str(i))
    assert cache.tree.root_of("kept") is kept and len(cache.tree._roots) < 5000
    assert cache.begin([5] * 21, scope="kept").num_cached and not cache.begin([5] * 21).num_cached
