"""Speculation changes when tokens come, never which: right, wrong, random and the module's own drafts."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mock_model import MockModel, byte_tokenizer
from small_models import build, config, drawn

from rorqual.engine import Completion, Engine, SamplingParams, sampler, speculation
from rorqual.engine.draft_policy import Policy, Terms
from rorqual.engine.memory import StateCost
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.errors import CacheError, ConfigError
from rorqual.model import Segment, Transformer

TOKENIZER = byte_tokenizer()
PATIENCE_S = 300

Drafter = Callable[[Sequence[int], int], Sequence[int]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Window, CSA, HCA, CSA, and an MTP module."""
    cfg = config(vocab_size=TOKENIZER.vocab_size, num_nextn_predict_layers=1, compress_ratios=[0, 4, 8, 4, 0])
    return build(cfg)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module drafts, and its drafts are verified, in every round, whatever they cost."""
    draw = random.Random(1)
    monkeypatch.setattr(Policy, "terms", lambda self, requests: Terms(draw.randrange(1, 6), 0.0, 0.0))
    monkeypatch.setattr(Policy, "judge", lambda *args, **more: None)
    monkeypatch.setattr(speculation, "MOST_MISSES", 0)  # nor does the text have to earn being looked at


def params_of(number: int, max_tokens: int) -> SamplingParams:
    """Greedy and sampled by turns, filtered, with scores, and with stops of both kinds."""
    draw = random.Random(number)
    return SamplingParams(
        temperature=(0.0, 0.7, 1.3)[number % 3], seed=number, max_tokens=max_tokens, logprobs=number % 2 == 0,
        top_p=0.9 if number % 4 == 3 else 1.0, stop=(chr(draw.randrange(97, 123)),) if number % 5 == 4 else (),
        stop_token_ids=(draw.randrange(3, 259),) if number % 5 == 2 else (),
    )  # fmt: skip


def prompts_of(count: int, seed: int) -> list[list[int]]:
    """Prompts that share beginnings."""
    draw = random.Random(seed)
    stem = [draw.randrange(3, 259) for _ in range(40)]
    return [stem[: draw.randrange(40)] + [draw.randrange(3, 259) for _ in range(1 + i % 7)] for i in range(count)]


def run(engine: Engine, prompts: list[list[int]], max_tokens: int = 12) -> list[Completion]:
    requests = [engine.submit(ids, params_of(i, max_tokens), wait=True) for i, ids in enumerate(prompts)]
    return [request.result(PATIENCE_S) for request in requests]


def same(mine: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)
        assert (a.logprobs, a.top_logprobs) == (b.logprobs, b.top_logprobs)


def plain(model: Transformer, prompts: list[list[int]], max_tokens: int = 12) -> list[Completion]:
    with Engine(model, TOKENIZER, max_running=3, chunk=16, speculate=False) as engine:
        return run(engine, prompts, max_tokens)


def drafters(known: list[Completion], seed: int) -> dict[str, Drafter]:
    """Ways to draft, by what they do to the tokens that will come."""
    draw = random.Random(seed)
    full = [(*one.prompt_ids, *one.ids) for one in known]

    def right(ids: Sequence[int], most: int) -> Sequence[int]:
        mine = next(one for one in full if one[: len(ids)] == tuple(ids))
        return mine[len(ids) : len(ids) + most]

    def corrupt(ids: Sequence[int], most: int) -> Sequence[int]:
        return [3 + (token + 1) % 250 for token in right(ids, most)] or [5] * most

    def first_right(ids: Sequence[int], most: int) -> Sequence[int]:
        true = list(right(ids, most))
        at = draw.randrange(0, most + 1)
        return [*true[:at], *[draw.randrange(3, 259) for _ in range(most - len(true[:at]))]]

    return {
        "right": right, "corrupt": corrupt, "first ones right": first_right,
        "random": lambda ids, most: [draw.randrange(0, 400) for _ in range(draw.randrange(most + 1))],
        "too many": lambda ids, most: [7] * (most + 9),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["right", "corrupt", "first ones right", "random", "too many"])
@pytest.mark.parametrize("has_cache", [False, True])
def test_forced_drafts(model: Transformer, kind: str, has_cache: bool) -> None:
    prompts = prompts_of(10, 3)
    expected = plain(model, prompts)
    drafter = drafters(expected, 5)[kind]
    cache = PrefixCache(model, memory_bytes=1 << 22, running_tokens=4096, page_tokens=8) if has_cache else None
    with Engine(
        model, TOKENIZER, max_running=3, chunk=16, prefix_cache=cache, speculate=drafter
    ) as engine:  # fmt: skip
        same(run(engine, prompts), expected)
        if has_cache:
            same(run(engine, prompts), expected)  # every prompt is there now, and what was sampled
            assert cache is not None and cache.stats.hits >= len(prompts)
        stats = engine.stats()
    assert stats.drafted_tokens > 20
    if kind == "right":
        assert stats.accepted_tokens > 20 and stats.accepted_length > 2
    if kind == "corrupt":
        assert stats.accepted_tokens == 0 and stats.accepted_length == 1


def test_right_drafts_save_steps(model: Transformer) -> None:
    """Twelve tokens in a prompt's step and two more; usage and stats say what was drafted."""
    [prompt] = prompts_of(1, 3)
    own = SamplingParams(temperature=0, max_tokens=12)
    with Engine(model, TOKENIZER, speculate=False) as engine:
        expected = engine.generate(prompt, own)
    with Engine(model, TOKENIZER, speculate=drafters(expected, 1)["right"], log_steps=99) as engine:
        [out] = engine.generate(prompt, own)
    assert out.ids == expected[0].ids and len(engine.step_log()) == 3
    assert (out.usage.drafted_tokens, out.usage.accepted_tokens) == (9, 9), "5 and the token after; 4 and the last"
    assert out.usage.completion_tokens == 12


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("has_cache", [False, True])
def test_drafts_of_the_module(model: Transformer, has_cache: bool) -> None:
    prompts = prompts_of(12, 7)
    expected = plain(model, prompts, 20)
    cache = PrefixCache(model, memory_bytes=1 << 22, running_tokens=4096, page_tokens=8) if has_cache else None
    with Engine(model, TOKENIZER, max_running=4, chunk=16, prefix_cache=cache, speculate=True) as engine:
        same(run(engine, prompts, 20), expected)
        assert engine.stats().drafted_tokens > 100


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("has_cache", [False, True])
def test_drafts_from_the_text_itself(model: Transformer, has_cache: bool) -> None:
    """Texts of six tokens, so that matches of all lengths come up; most are wrong."""
    draw, six = random.Random(8), range(97, 103)
    others = tuple(i for i in range(TOKENIZER.vocab_size) if i not in six)
    prompts = [[draw.choice(six) for _ in range(30)] for _ in range(10)]
    each = [params_of(i, 24).replace(suppress_token_ids=others, stop=(), stop_token_ids=()) for i in range(10)]
    with Engine(model, TOKENIZER, max_running=3, chunk=16) as engine:
        expected = engine.generate(prompts, each)
    cache = PrefixCache(model, memory_bytes=1 << 22, running_tokens=4096, page_tokens=8) if has_cache else None
    with Engine(model, TOKENIZER, max_running=4, chunk=16, prefix_cache=cache, speculate=True) as engine:
        assert engine.speculation is not None
        engine.speculation._has_module = False
        same(engine.generate(prompts, each), expected)
        stats = engine.stats()
    assert stats.drafted_tokens > 200 and 0 < stats.accepted_tokens < stats.drafted_tokens


def test_a_request_that_leaves_in_a_pause_stops_nobody(model: Transformer) -> None:
    """The round after it has no work."""
    greedy = SamplingParams(temperature=0.0, max_tokens=300)
    with Engine(model, TOKENIZER, speculate=True) as engine:
        assert engine.speculation is not None
        for kinds in (engine.speculation.policy.kinds, engine.speculation.policy.text_kinds):
            kinds[True].wait = 10_000
        request, deadline = engine.submit([5, 6, 7], greedy), time.monotonic() + PATIENCE_S
        while not engine.speculation.is_resting:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        request.cancel()
        assert request.result(PATIENCE_S).finish_reason == "cancelled"
        assert engine.generate([[8, 9]], greedy.replace(max_tokens=5))[0].finish_reason in ("length", "stop")


@pytest.mark.usefixtures("always")
@drawn(6)
@given(seed=st.integers(0, 1000), max_tokens=st.integers(1, 9), max_running=st.integers(1, 4))
def test_random_loads(model: Transformer, seed: int, max_tokens: int, max_running: int) -> None:
    """Limits of few tokens, priorities and a memory that throws requests out."""
    prompts = prompts_of(6, seed)
    expected = plain(model, prompts, max_tokens)
    limit = 5 * StateCost(model)(60) // 2
    with Engine(model, TOKENIZER, max_running=max_running, chunk=16, max_state_bytes=limit, speculate=True) as engine:
        requests = [
            engine.submit(ids, params_of(i, max_tokens), wait=True, priority=i % 3) for i, ids in enumerate(prompts)
        ]
        same([request.result(PATIENCE_S) for request in requests], expected)


@pytest.mark.usefixtures("always")
def test_preemption_and_cancelled_requests(model: Transformer) -> None:
    prompts = [ids * 3 for ids in prompts_of(6, 11)]
    expected = plain(model, prompts, 30)
    with Engine(model, TOKENIZER, max_running=3, chunk=16, max_queued=99, speculate=True) as engine:
        low = [engine.submit(ids, params_of(i, 30)) for i, ids in enumerate(prompts)]
        next(iter(low[0]))  # it decodes now
        doomed = engine.submit(prompts[0], SamplingParams(max_tokens=500), priority=1)
        high = [engine.submit(ids, params_of(i, 30), priority=2) for i, ids in enumerate(prompts)]
        next(iter(doomed))
        doomed.cancel()
        same([request.result(PATIENCE_S) for request in high], expected)
        same([request.result(PATIENCE_S) for request in low], expected)
        assert engine.stats().preemptions > 0


@pytest.mark.usefixtures("always")
def test_a_step_that_fails_with_drafts_is_made_again_without(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(5, 13)
    expected = plain(model, prompts)
    real = Transformer.next_scores

    def fails(self: Transformer, segments: Any, *rest: Any) -> Any:
        if any(segment.state.lengths[0] and 1 < len(segment.tokens) < 7 for segment in segments):
            real(self, segments, *rest)
            raise CacheError("a step that fails behind its model")
        return real(self, segments, *rest)

    monkeypatch.setattr(Transformer, "next_scores", fails)
    with Engine(model, TOKENIZER, max_running=2, chunk=64, speculate=True) as engine:
        same(run(engine, prompts), expected)
        assert engine.stats().failed_steps > 0


def test_sampled_tokens_have_the_model_s_distribution(model: Transformer) -> None:
    """Third tokens over many seeds, with drafts from their support, against the exact mixture over the first two."""
    prompt, count, draw = [40, 41, 42], 400, random.Random(2)
    support: dict[int, list[int]] = {}
    own = SamplingParams(temperature=0.4, top_k=3, max_tokens=3)
    exact: dict[int, float] = {}
    with torch.inference_mode():

        def spread(ids: list[int], weight: float) -> None:
            probs = sampler.filtered_probabilities(model(torch.tensor([ids]))[0, -1], own)
            support.setdefault(len(ids), []).extend(probs.nonzero()[:, 0].tolist())
            for token in probs.nonzero()[:, 0].tolist():
                if len(ids) == len(prompt) + 2:
                    exact[token] = exact.get(token, 0.0) + weight * float(probs[token])
                elif token != TOKENIZER.eos_token_id:
                    spread([*ids, token], weight * float(probs[token]))

        spread(prompt, 1.0)

    def guess(ids: Sequence[int], most: int) -> list[int]:
        return [draw.choice(support[at]) for at in range(len(ids), len(ids) + most) if at in support]

    with Engine(model, TOKENIZER, max_queued=count, speculate=guess) as engine:
        outs = engine.generate([prompt] * count, [own.replace(seed=i) for i in range(count)])
        assert engine.stats().accepted_tokens > 40
    thirds = [out.ids[2] for out in outs if len(out.ids) == 3]
    assert set(thirds) <= set(exact)
    total = sum(exact.values())
    # Pearson's chi-square over tokens expected at least 5 times; 5 standard deviations above its mean is far out
    classes = [t for t, p in exact.items() if len(thirds) * p / total >= 5]
    wanted = {token: len(thirds) * exact[token] / total for token in classes}
    chi = sum((thirds.count(token) - n) ** 2 / n for token, n in wanted.items())
    assert chi < len(classes) + 5 * (2 * len(classes)) ** 0.5


def test_where_speculation_is_on(model: Transformer) -> None:
    bare = build(config(vocab_size=TOKENIZER.vocab_size))
    for is_on in (True, False):
        with Engine(model, TOKENIZER, speculate=is_on) as engine:
            assert (engine.speculation is not None) == is_on
    assert speculation.has_mtp(model) and not speculation.has_mtp(bare)
    with pytest.raises(ConfigError, match="does not"):
        Engine(MockModel(), TOKENIZER, speculate=True)
    own = SamplingParams(temperature=0, max_tokens=60, suppress_token_ids=(TOKENIZER.eos_token_id,))
    [prompt] = prompts_of(1, 3)
    with Engine(bare, TOKENIZER) as engine:
        expected = engine.generate(prompt * 3, own)
    with Engine(bare, TOKENIZER, speculate=True) as engine:  # from the text alone
        assert engine.generate(prompt * 3, own)[0].ids == expected[0].ids


def test_a_pause_is_passed_and_drafts_come_again(model: Transformer) -> None:
    """Rounds of a pause neither draft nor watch; behind it the module drafts; the tokens are the same throughout."""
    [prompt] = prompts_of(1, 3)
    own = SamplingParams(temperature=0, max_tokens=150, suppress_token_ids=(TOKENIZER.eos_token_id,))
    with Engine(model, TOKENIZER) as engine:
        expected = engine.generate(prompt, own)
    with Engine(model, TOKENIZER, speculate=True) as engine:
        assert engine.speculation is not None
        kind = engine.speculation.policy.kinds[True]
        kind.wait = 100
        assert engine.generate(prompt, own)[0].ids == expected[0].ids
        assert engine.stats().drafted_tokens > 0 or kind.pause > 128, "it was tried"
        kind.wait = 1000
        before = engine.stats().drafted_tokens
        assert engine.generate([prompt] * 3, own)[2].ids == expected[0].ids
        assert engine.stats().drafted_tokens == before and 0 < kind.wait < 1000


@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_drafts_left_behind_is_gone_bit_for_bit(model: Transformer, count: int) -> None:
    """After wrong drafts are taken back, the next tokens' scores are those of a state that never saw them."""
    row = torch.tensor([3 + 7 * i % 250 for i in range(60)])
    with torch.inference_mode():
        plain, drafted = model.new_state(1), model.new_state(1)
        for state in (plain, drafted):
            model.step([Segment(state, row[:20])])
        for at in range(20, 50):
            expected = model.next_scores([Segment(plain, row[at : at + 1])])
            wrong = torch.cat([row[at : at + 1], (row[at + 1 : at + 1 + count] + 11) % 250])
            found = model.next_scores([Segment(drafted, wrong)], [0])
            drafted.truncate(at + 1)
            assert torch.equal(found.logits, expected.logits)
