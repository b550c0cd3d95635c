"""Rollouts from one engine: what they hold, that nothing changes them, and that the log gives them back."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from mock_model import byte_tokenizer
from rollout_models import SAMPLING, VOCAB, flat, tiny_engine, tiny_policy, tiny_prompts, told

from rorqual.engine import Engine, SamplingParams, TokenEvent
from rorqual.errors import CacheError, ConfigError, JournalError, RequestError
from rorqual.journal import Journal, Tokens
from rorqual.model import Trace, Transformer
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import GIVEN, Prompt, Rollout, RolloutWorker, router_names
from rorqual.posttrain.rollouts_batch import stack
from rorqual.posttrain.scoring import token_logprobs

EOS = byte_tokenizer().eos_token_id
FILTERED = SAMPLING.replace(temperature=0.8, top_p=0.9, suppress_token_ids=(7, 8))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_policy()


@pytest.fixture
def engine(model: Transformer) -> Iterator[Engine]:
    with tiny_engine(model, max_running=4) as engine:
        yield engine


def test_groups_come_whole_and_lists_are_one_an_id(engine: Engine) -> None:
    worker = RolloutWorker(engine, reward=lambda prompt, rollout: prompt.data + len(rollout.answer) / 100)
    groups = list(worker.generate(tiny_prompts(3), 4, SAMPLING))
    assert sorted(group[0].prompt_id for group in groups) == ["p0", "p1", "p2"]
    for group in groups:
        assert [one.index for one in group] == [0, 1, 2, 3]
        for one in group:
            prompt = tiny_prompts(3)[one.group]
            assert one.prompt_id == prompt.id
            length = len(one.trajectory)
            assert len(one.versions) == len(one.trajectory.mask) == length
            assert one.trajectory.ids[: len(prompt.ids)] == list(prompt.ids)
            assert one.trajectory.mask == [False] * len(prompt.ids) + [True] * len(one.answer)
            assert one.versions == [GIVEN] * len(prompt.ids) + [0] * len(one.answer)
            assert one.truncated == (one.answer[-1] != byte_tokenizer().eos_token_id)
            assert one.reward == prompt.data + len(one.answer) / 100
    answers = {tuple(one.answer) for one in flat(groups)}
    assert len(answers) > 8 and any(one.truncated for one in flat(groups))  # drawn, not the same one again


@pytest.mark.parametrize("sampling", [SAMPLING, FILTERED], ids=["plain", "filtered"])
def test_log_probabilities_are_those_that_the_trainer_computes(
    model: Transformer, engine: Engine, sampling: SamplingParams
) -> None:
    """pi_old is the distribution that was drawn from: temperature, filters, suppressed ids, and the head's padding."""
    worker = RolloutWorker(engine, keep_masks=True, keep_routing=True)
    batch = stack(flat(worker.generate(tiny_prompts(3), 3, sampling)))
    with torch.no_grad():
        scores = token_logprobs(
            model, batch.ids, None, sampling.temperature, batch.sampling_mask, batch.routing,
            lengths=batch.lengths, wanted=batch.chosen,
        )  # fmt: skip
    assert float((scores - batch.logprobs).abs().max()) < 1e-5
    assert bool((batch.versions >= 0).eq(batch.chosen).all())


def test_masks_are_what_could_be_drawn(model: Transformer, engine: Engine) -> None:
    choices = byte_tokenizer().vocab_size
    assert choices < VOCAB
    plain = flat(RolloutWorker(engine, keep_masks=True).generate(tiny_prompts(1), 2, SAMPLING))
    for one in plain:
        assert one.sampling_masks is not None
        for token, mask, chosen in zip(one.trajectory.ids, one.sampling_masks, one.trajectory.mask, strict=True):
            assert (mask is None) == (not chosen)
            assert mask is None or (mask.tolist() == list(range(choices)) and token in mask)
    for one in flat(RolloutWorker(engine, keep_masks=True).generate(tiny_prompts(1), 2, FILTERED)):
        assert one.sampling_masks is not None
        for at in range(4, len(one.trajectory)):
            with torch.no_grad():
                logits = model(torch.tensor([one.trajectory.ids[:at]]))[0, -1, :choices].double()
            logits[[7, 8]] = -torch.inf
            probs, order = torch.softmax(logits / 0.8, -1).sort(descending=True, stable=True)
            kept = order[(probs.cumsum(-1) - probs < 0.9)].tolist()
            mask = one.sampling_masks[at]
            assert mask is not None and len(set(mask.tolist()) ^ set(kept)) <= 1  # the edge of top-p may round


def test_routing_is_what_a_pass_over_the_ids_would_choose(model: Transformer, engine: Engine) -> None:
    for one in flat(RolloutWorker(engine, keep_routing=True).generate(tiny_prompts(2), 2, SAMPLING)):
        trace = Trace(router=True, router_ids=True)
        with torch.inference_mode():
            model.forward_streams(torch.tensor([one.trajectory.ids[:-1]]), state=model.new_state(1), trace=trace)
        learned = {record.name: record.experts for record in trace.routers if not record.is_hash}
        assert one.routing is not None and set(one.routing) == set(learned) == set(router_names(model))
        for name, experts in learned.items():
            assert experts is not None and np.array_equal(one.routing[name], experts[0].numpy())


def test_neighbours_and_order_change_nothing(model: Transformer) -> None:
    prompts = tiny_prompts(4)
    with tiny_engine(model, max_running=8) as wide:
        together = told(flat(RolloutWorker(wide, keep_masks=True).generate(prompts, 3, FILTERED)))
    with tiny_engine(model, max_running=1) as narrow:
        alone = told(flat(RolloutWorker(narrow, keep_masks=True).generate(prompts[::-1], 3, FILTERED)))
        other = told(flat(RolloutWorker(narrow, seed=1, keep_masks=True).generate(prompts, 3, FILTERED)))
    assert together == alone
    assert other.keys() == alone.keys() and other != alone


def counted(worker: RolloutWorker) -> threading.Semaphore:
    """Released with every token that the worker takes."""
    taken, keep = threading.Semaphore(0), worker._keep

    def keep_and_count(run: object, event: object) -> None:
        keep(run, event)  # type: ignore[arg-type]
        taken.release()

    worker._keep = keep_and_count  # type: ignore[method-assign]
    return taken


def after(worker: RolloutWorker, tokens: int, act: Callable[[], object]) -> None:
    """Have `act` called by the engine's thread once the worker has taken so many tokens."""
    keep, left = worker._keep, iter(range(tokens - 1, -1, -1))

    def keep_and_act(run: object, event: object) -> None:
        keep(run, event)  # type: ignore[arg-type]
        if next(left, None) == 0:
            act()

    worker._keep = keep_and_act  # type: ignore[method-assign]


def preempted(worker: RolloutWorker, rollouts: Iterator[list[Rollout]], *, every: int = 20) -> list[Rollout]:
    """All of them, while another thread takes the machine away every few tokens, in turn with and without states."""
    taken, is_over = counted(worker), threading.Event()

    def disturb() -> None:
        for turn in count():
            for _ in range(every):
                taken.acquire()
            if is_over.is_set():
                return
            if turn % 3 == 2:
                for id in list(worker.running):
                    worker.preempt(id, keep_state=False)
            else:
                worker.pause(on_disk=turn % 3 == 1)
                worker.resume()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        return flat(rollouts)
    finally:
        is_over.set()
        taken.release(every)
        thread.join()


@pytest.mark.parametrize(
    "sampling", [SAMPLING, pytest.param(FILTERED, marks=pytest.mark.slow)], ids=["plain", "filtered"]
)
def test_preemption_changes_no_bit(engine: Engine, tmp_path: Path, sampling: SamplingParams) -> None:
    prompts = tiny_prompts(3)
    keep = {"keep_masks": True, "keep_routing": True}
    calm = told(flat(RolloutWorker(engine, **keep).generate(prompts, 4, sampling)))
    with RolloutLog(tmp_path, sync=False) as log:
        worker = RolloutWorker(engine, log=log, **keep)
        disturbed = preempted(worker, worker.generate(prompts, 4, sampling))
        assert worker.preemptions > 10
        assert told(disturbed) == calm
        rows = log.rows()
        assert told(log.load(rows, router_names(engine.model), keep_masks=True)) == calm


def test_a_saved_state_spares_reading_again(engine: Engine) -> None:
    prompt, params = tuple(range(5, 45)), SamplingParams(seed=3, max_tokens=30, record=True, suppress_token_ids=(EOS,))
    whole = engine.submit(prompt, params).result()
    assert len(whole.ids) == 30
    seen = threading.Semaphore(0)
    request = engine.submit(prompt, params, listener=lambda event: seen.release())
    for _ in range(5):
        seen.acquire()
    request.suspend()
    part = request.result()
    assert part.finish_reason == "cancelled" and len(part.ids) >= 5 and request.saved is not None
    rest = params.replace(max_tokens=30 - len(part.ids))
    before = engine.stats().prompt_tokens
    resumed = engine.submit((*prompt, *part.ids), rest, saved=request.saved).result()
    assert part.ids + resumed.ids == whole.ids
    assert engine.stats().prompt_tokens - before <= 1
    with pytest.raises(CacheError, match="not the first of the"):
        engine.submit((9, *prompt, *part.ids), rest, saved=request.saved)


def test_the_log_answers_for_what_is_whole_and_goes_on_with_the_rest(model: Transformer, tmp_path: Path) -> None:
    prompts = tiny_prompts(2)
    rewards: list[str] = []

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        rewards.append(rollout.id)
        return float(len(rewards))

    with tiny_engine(model, max_running=1) as engine, RolloutLog(tmp_path) as log:
        worker = RolloutWorker(engine, log=log, reward=reward, in_flight=1)
        first = next(worker.generate(prompts, 2, SAMPLING))
    sampled = engine.stats().sampled_tokens
    with tiny_engine(model) as engine, RolloutLog(tmp_path) as log:
        worker = RolloutWorker(engine, log=log, reward=reward)
        groups = list(worker.generate(prompts, 2, SAMPLING))
        assert engine.stats().sampled_tokens < sum(len(one.answer) for one in flat(groups)) - sampled + 3
        rows = log.rows()
    assert told(groups[0]) == told(first) and [one.reward for one in groups[0]] == [1.0, 2.0]
    assert sorted(rewards) == ["p0/0", "p0/1", "p1/0", "p1/1"]
    with tiny_engine(model) as engine:
        assert told(flat(groups)) == told(flat(RolloutWorker(engine).generate(prompts, 2, SAMPLING)))
    for row, one in zip(rows, flat(groups), strict=True):
        assert (row.id, row.prompt_id, row.reward, row.truncated) == (one.id, one.prompt_id, one.reward, one.truncated)
        assert row.num_prompt + row.num_drawn == len(one.trajectory) and row.versions == (0, 0)


def test_a_log_takes_no_rollout_of_other_settings(engine: Engine, tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        list(RolloutWorker(engine, log=log).generate(tiny_prompts(1), 1, SAMPLING))
        for worker, prompts, sampling in (
            (RolloutWorker(engine, log=log, seed=1), tiny_prompts(1), SAMPLING),
            (RolloutWorker(engine, log=log), [Prompt("p0", (4, 5))], SAMPLING),
            (RolloutWorker(engine, log=log), tiny_prompts(1), SAMPLING.replace(temperature=0.5)),
        ):
            with pytest.raises(JournalError, match="another prompt, seed or sampling"):
                list(worker.generate(prompts, 1, sampling))


def test_tokens_are_in_the_log_as_the_specification_has_them(engine: Engine, tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        worker = RolloutWorker(engine, log=log, keep_masks=True)
        [one] = flat(worker.generate(tiny_prompts(1), 1, FILTERED))
    with Journal(tmp_path / "journal") as journal:
        tokens = [record for _, record in journal.replay() if isinstance(record, Tokens)]
    assert [token for record in tokens for token in record.ids] == one.answer
    assert [record.first_position for record in tokens] == list(range(4, len(one.trajectory)))
    assert all(record.mask is not None and record.policy_version == 0 for record in tokens)


def test_weights_change_between_tokens_and_every_token_says_which(model: Transformer) -> None:
    """After a switch tokens are those that the new weights draw behind the same beginning, and are scored by them."""
    other = tiny_policy(seed=2)
    weights = other.state_dict()
    with tiny_engine(tiny_policy(), max_running=4) as engine:
        worker = RolloutWorker(engine, keep_masks=True)
        after(worker, 20, lambda: worker.update_weights(weights, 7))
        made = flat(worker.generate(tiny_prompts(4), 4, SAMPLING))
    versions = {version for one in made for version in one.versions}
    assert versions == {GIVEN, 0, 7}
    mixed = [one for one in made if {0, 7} <= set(one.versions)]
    assert mixed and all(one.oldest_version == 0 and one.versions == sorted(one.versions) for one in mixed)
    batch = stack(mixed)
    with torch.no_grad():
        for version, scorer in ((0, model), (7, other)):
            scores = token_logprobs(scorer, batch.ids, None, 1.0, batch.sampling_mask, lengths=batch.lengths)
            there = batch.versions == version
            assert float((scores - batch.logprobs)[there].abs().max()) < 1e-5


def test_states_may_stay_when_weights_change() -> None:
    """Then nothing is read again: what older weights computed goes on being attended to."""
    prompt, params = tuple(range(5, 45)), SamplingParams(seed=3, max_tokens=30, record=True, suppress_token_ids=(EOS,))
    policy, weights = tiny_policy(), tiny_policy(seed=2).state_dict()

    def at_fifth(left: Iterator[int], act: Callable[[], object], event: TokenEvent) -> None:
        if next(left, None) == 0:
            act()

    for version, keep_states in ((1, True), (2, False)):
        with tiny_engine(policy) as engine:
            switch = partial(engine.load_weights, weights, version, keep_states=keep_states)
            request = engine.submit(prompt, params, listener=partial(at_fifth, iter(range(4, -1, -1)), switch))
            request.result()
            assert [event.policy_version for event in request.events] == [0] * 5 + [version] * 25
            assert (engine.stats().prompt_tokens == len(prompt)) == keep_states


def test_weights_of_another_model_are_refused_before_anything_changes(engine: Engine, model: Transformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in (("layers.9.nothing", torch.zeros(1)), ("head.weight", torch.zeros(3, 3))):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            engine.load_weights({"embed.weight": torch.zeros_like(model.embed.weight), name: tensor}, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RequestError, match="versions of weights"):
        engine.load_weights({}, -1)


def test_what_cannot_be_trained_on_or_resumed_is_refused(engine: Engine) -> None:
    worker = RolloutWorker(engine)
    for sampling, field in ((SamplingParams(temperature=0), "temperature"), (SamplingParams(stop="x"), "stop")):
        with pytest.raises(RequestError, match=field):
            next(worker.generate(tiny_prompts(1), 1, sampling))
    with pytest.raises(RequestError, match="two prompts have the id"):
        next(worker.generate([*tiny_prompts(1), *tiny_prompts(1)], 1, SAMPLING))
    with pytest.raises(RequestError, match="group_size"):
        next(worker.generate(tiny_prompts(1), 0, SAMPLING))
    with pytest.raises(ConfigError, match="in_flight"):
        RolloutWorker(engine, in_flight=0)


def test_a_call_that_is_given_up_leaves_nothing_running(engine: Engine) -> None:
    worker = RolloutWorker(engine)
    groups = worker.generate(tiny_prompts(4), 4, SAMPLING)
    next(groups)
    groups.close()  # type: ignore[attr-defined]
    assert engine.occupancy() == (0, 0) and not worker.running
    assert len(flat(worker.generate(tiny_prompts(2), 2, SAMPLING))) == 4


def test_batches_of_unlike_rollouts_are_refused(engine: Engine) -> None:
    [plain] = flat(RolloutWorker(engine).generate(tiny_prompts(1), 1, SAMPLING))
    [routed] = flat(RolloutWorker(engine, keep_routing=True).generate(tiny_prompts(1), 1, SAMPLING))
    with pytest.raises(RequestError, match="routing"):
        stack([plain, routed])
