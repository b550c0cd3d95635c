"""The retrieval guard changes what is read and nothing else: every way to the same tokens gives the same bits."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from mock_model import HashModel, byte_tokenizer
from small_models import build, config
from starlette.testclient import TestClient

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.guard import SOURCES, sources_of
from rorqual.engine.memory import StateCost
from rorqual.engine.picks import find_picks
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.errors import ConfigError, RequestError
from rorqual.model import Segment, Trace, Transformer
from rorqual.model.guard import Guard, Rules
from rorqual.ops.forced_entries import ANSWERS, ASKS, Policy
from rorqual.server import create_app

TOKENIZER = byte_tokenizer()
ROLES = np.zeros(64, np.uint8)
ROLES[60], ROLES[61] = ASKS, ANSWERS
SMALL = Policy(4, 8, first=2, last=2, system_first=1, pinned_most=4, recent=8, hits=2, behind=1, lexical_most=6)
KINDS: list[dict[str, Any]] = [
    {}, {"extra": 1.5}, {"neighbours": True}, {"temporal": True}, {"recheck": 0.01},
    {"extra": 2.0, "neighbours": True, "temporal": True, "recheck": 0.05},
]  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> Transformer:
    """Window, three CSA layers around an HCA; three entries of a choice."""
    built = build(config(compress_ratios=[0, 4, 8, 4, 4], num_hidden_layers=5))
    return built.bfloat16() if request.param == "bf16" else built


@pytest.fixture(scope="module")
def speaker() -> Transformer:
    """One with the byte tokenizer's vocabulary, for engines."""
    return build(config(vocab_size=TOKENIZER.vocab_size, compress_ratios=[0, 4, 8, 4]))


def guard_of(model: Transformer, kinds: dict[str, Any]) -> Guard:
    return Guard(model.cfg, Rules(SMALL, **kinds), ROLES, [(20, 24)])


def some_text(draw: random.Random, count: int) -> list[int]:
    return [draw.choice((60, 61)) if draw.random() < 0.05 else draw.randrange(12) for _ in range(count)]


@torch.inference_mode()
def in_pieces(model: Transformer, ids: list[int], guard: Guard, draw: random.Random) -> torch.Tensor:
    """In steps of any size, with drafts taken back, from a copy now and then."""
    state, parts, at = model.new_state(1, rewind=6), list[torch.Tensor](), 0
    state.guard_by(guard)
    while at < len(ids):
        count = min(draw.choice((1, 1, 2, 5, 17, 40)), len(ids) - at)
        if draw.random() < 0.3:
            wrong = [draw.randrange(12) for _ in range(draw.randrange(1, 6))]
            model.step([Segment(state, wrong)])
            state.truncate(at)
        if draw.random() < 0.2:
            state = state.fork()
        parts.append(model.step([Segment(state, ids[at : at + count])]))
        at += count
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_any_cut_gives_the_bits_of_one_pass(model: Transformer, kinds: dict[str, Any]) -> None:
    draw = random.Random(len(str(kinds)))
    ids = some_text(draw, 220)
    with torch.inference_mode():
        state = model.new_state(1)
        state.guard_by(guard_of(model, kinds))
        whole = model.forward_streams(torch.tensor([ids]), state=state)
        plain = model.forward_streams(torch.tensor([ids]), state=model.new_state(1))
        fused_state = model.new_state(1)
        fused_state.guard_by(guard_of(model, kinds))
        fused = model.step([Segment(fused_state, ids)])
    assert not torch.equal(whole, plain)
    assert torch.equal(whole, fused)
    assert torch.equal(whole, in_pieces(model, ids, guard_of(model, kinds), draw))
    assert state.guard is not None and fused_state.guard is not None
    assert state.guard.counts == fused_state.guard.counts


@torch.inference_mode()
def test_company_changes_nothing(model: Transformer) -> None:
    """Guarded and unguarded sequences share steps."""
    draw = random.Random(3)
    texts = [some_text(draw, 150) for _ in range(4)]

    def state_of(i: int) -> Any:
        state = model.new_state(1)
        state.guard_by(guard_of(model, KINDS[i // 2]) if i % 2 else None)
        return state

    alone = [model.step([Segment(state_of(i), ids)])[0, -6:] for i, ids in enumerate(texts)]
    states = [state_of(i) for i in range(4)]
    for state, ids in zip(states, texts, strict=True):
        model.step([Segment(state, ids[:144])])
    together = [
        model.step([Segment(state, [ids[at]]) for state, ids in zip(states, texts, strict=True)])[0]
        for at in range(144, 150)
    ]
    for i, mine in enumerate(alone):
        assert torch.equal(torch.stack([step[i] for step in together]), mine)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@torch.inference_mode()
def test_what_is_read_holds_all_that_the_indexer_picks(model: Transformer, kinds: dict[str, Any]) -> None:
    """And what is forced, and nothing that is not there yet (6.1, L4)."""
    ids = some_text(random.Random(8), 200)
    names = [spec.index for spec in model.cfg.layers if spec.has_indexer]
    trace = Trace(capture=[f"layers.{i}.attn.{what}" for i in names for what in ("index_topk", "index_used")])
    state = model.new_state(1)
    state.guard_by(guard_of(model, kinds))
    model.forward_streams(torch.tensor([ids]), state=state, trace=trace)
    shown = guard_of(model, kinds).shown(torch.tensor(ids), 0, ids)
    for i in names:
        own, used = (trace.captured[f"layers.{i}.attn.{what}"][0].tolist() for what in ("index_topk", "index_used"))
        for t in range(len(ids)):
            mine, read = set(own[t]) - {-1}, [entry for entry in used[t] if entry >= 0]
            assert read == sorted(set(read))
            assert mine | set(shown.forced.entries[t, : shown.forced.sizes[t]].tolist()) <= set(read)
            assert all((entry + 1) * 4 <= t + 1 for entry in read)


@torch.inference_mode()
def test_with_room_for_all_a_guard_changes_nothing(model: Transformer) -> None:
    """k no smaller than what can be seen: the guard has nothing to add (L8)."""
    wide = build(config(compress_ratios=[0, 4, 8, 4, 4], num_hidden_layers=5, index_topk=60)).to(model.reference.dtype)
    ids = some_text(random.Random(2), 200)
    state = wide.new_state(1)
    state.guard_by(guard_of(wide, {}))
    assert torch.equal(wide.step([Segment(state, ids)]), wide.step([Segment(wide.new_state(1), ids)]))


def answers(engine: Engine, prompts: list[list[int]], guard: str | None) -> list[Any]:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=True, guard=guard)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    return [request.result(120) for request in requests]


def test_engines_agree_whatever_they_do(speaker: Transformer) -> None:
    """Cache, chunks, company, drafts and preemption: the tokens and log probabilities of a lone request."""
    draw = random.Random(1)
    shared = [draw.randrange(3, 9) for _ in range(200)]
    prompts = [[*shared[: draw.randrange(100, 200)], *(draw.randrange(3, 9) for _ in range(30))] for _ in range(4)]
    with Engine(speaker, TOKENIZER, max_running=1) as engine:
        plain = answers(engine, prompts, None)
        wanted = answers(engine, prompts, "default")
    assert [one.logprobs for one in plain] != [one.logprobs for one in wanted]
    assert all(one.exactness.guard is None for one in plain)
    for one in wanted:
        use = one.exactness.guard
        assert use["sources"] == ("anchors", "pinned", "lexical") and use["step"] == "fused"
        assert use["queries"] > 0 and use["entries_added"] > 0 and use["bytes_factor"] > 1
        assert one.exactness.level == "bitwise"
    for more in (
        {"chunk": 40, "guard": "default"},
        {"chunk": 64, "speculate": lambda ids, most: [ids[-1]] * most},
        {"prefix_cache": PrefixCache(speaker, memory_bytes=1 << 22, running_tokens=4096)},
        {"max_state_bytes": 600_000},
    ):
        with Engine(speaker, TOKENIZER, **more) as engine:  # type: ignore[arg-type]
            for _ in range(2):
                asked = None if "guard" in more else "default"
                found = answers(engine, prompts, asked)
                assert [one.logprobs for one in found] == [one.logprobs for one in wanted], more.keys()
                assert [one.ids for one in found] == [one.ids for one in wanted]
            if "prefix_cache" in more:
                assert any(one.usage.cached_tokens for one in found)
                mine = answers(engine, prompts, "off")  # nothing that was read with the guard is used
                assert [one.logprobs for one in mine] == [one.logprobs for one in plain]


def test_looking_back_runs_with_the_guard(speaker: Transformer) -> None:
    prompt = [random.Random(5).randrange(3, 9) for _ in range(150)]
    with Engine(speaker, TOKENIZER, guard="default") as engine:
        done = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=8)).result(60)
        guard = engine.guards.of(None, ())
        with_it = engine.aside(find_picks(speaker, prompt, done.ids, guard)).result(60)
        without = engine.aside(find_picks(speaker, prompt, done.ids)).result(60)
    assert all((a.picked.sum() > b.picked.sum()) for a, b in zip(with_it.layers, without.layers, strict=True))


def test_a_sources_name_says_what_it_is() -> None:
    assert sources_of("off") == () and sources_of("lexical, anchors") == ("anchors", "lexical")
    assert set(sources_of("default")) <= set(SOURCES)
    with pytest.raises(ConfigError, match="no source 'luck'"):
        sources_of("luck")


def test_what_cannot_be_guarded_is_refused(speaker: Transformer) -> None:
    with pytest.raises(ConfigError, match="inside a rorqual.Transformer"):
        Engine(HashModel(), TOKENIZER, guard="default")
    with pytest.raises(ConfigError, match="no indexer"):
        Engine(build(config(vocab_size=TOKENIZER.vocab_size, compress_ratios=[0, 8, 8, 0])), TOKENIZER, guard="default")
    cache = PrefixCache(speaker, memory_bytes=1 << 20, running_tokens=512)
    with Engine(speaker, TOKENIZER, prefix_cache=cache) as engine:
        with pytest.raises(RequestError, match="prefix cache") as refused:
            engine.submit([5], SamplingParams(guard="temporal"))
        assert refused.value.param == "guard"
    with pytest.raises(RequestError, match="pin value"):
        SamplingParams(pin=[(4, 4)])


def test_over_http_a_request_chooses_and_its_answer_tells(speaker: Transformer) -> None:
    with Engine(speaker, TOKENIZER) as engine:
        client = TestClient(create_app(engine, "small"))
        fields = {"model": "small", "prompt": "to be or not to be, that is what is asked " * 4, "max_tokens": 3}
        told = [
            client.post("/v1/completions", json={**fields, **more}).json()["exactness"]["guard"]
            for more in ({}, {"rorqual": {"guard": "lexical"}}, {"rorqual": {"guard": "off"}})
        ]
    assert told[0] is None and told[2] is None
    assert told[1]["sources"] == ["lexical"] and told[1]["forced"]["lexical"] > 0 == told[1]["forced"]["anchors"]


def test_over_http_a_request_pins_spans_or_texts(speaker: Transformer) -> None:
    text = "the key is 7 and more. " + "to be or not to be " * 12 + "the end, and the key"
    with Engine(speaker, TOKENIZER) as engine:
        client = TestClient(create_app(engine, "small"))

        def ask(**more: Any) -> Any:
            fields = {"model": "small", "prompt": text, "max_tokens": 2, "rorqual": {"guard": "pinned", **more}}
            return client.post("/v1/completions", json=fields)

        bare = ask()
        before = bare.json()["usage"]["prompt_tokens"] - len(text)  # tokens of this tokenizer are bytes
        begin = text.index("not to be") + before
        spans = [[before + at, before + at + 9] for at in range(len(text)) if text.startswith("not to be", at)]
        by_place, by_text = ask(pin=spans), ask(pin=["not to be"])
        assert bare.json()["exactness"]["guard"]["forced"]["pinned"] == 0, bare.text
        told = by_place.json()["exactness"]["guard"]["forced"]["pinned"]
        assert told > 0 and by_text.json()["exactness"]["guard"]["forced"]["pinned"] == told
        one = ask(pin=[[begin, begin + 9]]).json()["exactness"]["guard"]["forced"]["pinned"]
        assert 0 < one < told
        for more, param in (
            ({"pin": [[0, len(text) + before + 1]]}, "rorqual.pin[0]"), ({"pin": [[0, 4], [5, 5]]}, "rorqual.pin[1]"),
            ({"pin": ["nowhere"]}, "rorqual.pin[0]"), ({"pin": [[0, 4]], "guard": "lexical"}, "rorqual.pin"),
            ({"pin": [[0, 4]], "guard": "off"}, "rorqual.pin"), ({"pin": [[0]]}, "rorqual.pin[0]"),
            ({"pin": [[0, 4]], "guard": "nonsense"}, "rorqual.guard"), ({"guard": "nonsense"}, "rorqual.guard"),
            ({"pin": [["0", 4]]}, "rorqual.pin[0]"), ({"pin": [""]}, "rorqual.pin[0]"), ({"pin": 3}, "rorqual.pin"),
        ):  # fmt: skip
            refused = ask(**more)
            assert refused.status_code == 400 and (refused.json()["error"]["param"] == param), more
        chat = {"model": "small", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        asked = {**chat, "rorqual": {"guard": "pinned", "pin": ["not to be"]}}
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert answer["exactness"]["guard"]["forced"]["pinned"] > 0


@pytest.mark.parametrize("cuts", [[1], [400], [7, 300, 1, 64], [255, 1, 1], [256, 1, 500], [1] * 40])
def test_what_a_guard_remembers_is_within_what_is_charged(cuts: list[int]) -> None:
    guard = Guard(config(compress_ratios=[0, 4, 8, 4]), Rules(SMALL), ROLES)
    ids = np.arange(sum(cuts), dtype=np.int32) % 60
    done = 0
    for count in cuts:
        guard.shown(torch.from_numpy(ids), done, ids[done : done + count].tolist())
        done += count
        assert guard.nbytes <= guard.most_bytes(done)


def test_memory_for_states_counts_their_guards(speaker: Transformer) -> None:
    prompt = list(range(4, 54)) * 4
    params = SamplingParams(max_tokens=8)
    with Engine(speaker, TOKENIZER) as engine:
        with_guard = engine.guards.of("default", ())
    assert with_guard is not None
    alone = StateCost(speaker)(len(prompt) + 8)
    with Engine(speaker, TOKENIZER, max_state_bytes=alone + with_guard.most_bytes(208) // 2) as engine:
        assert len(list(engine.submit(prompt, params))) >= 1
        with pytest.raises(RequestError, match="needs") as refused:
            engine.submit(prompt, params.replace(guard="default"))
        assert refused.value.code == "context_length_exceeded"
    for limit, together in ((2, True), (1, False)):
        most = limit * (alone + with_guard.most_bytes(208)) + (0 if together else alone)
        with Engine(speaker, TOKENIZER, max_state_bytes=most) as engine:
            handles = [engine.submit(prompt, params.replace(guard="default")) for _ in range(2)]
            for handle in handles:
                list(handle)
            records = engine.step_log()
            assert max(one.charged_bytes for one in records) <= most
            assert (max(one.running for one in records) == 2) is together
