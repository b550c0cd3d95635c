"""Agents' rollouts that are preempted at random moments are, to the bit, those of a quiet run; no call runs twice."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_toy import SHELL, Choosing, judge, prompts, reply
from local_sandbox import Maker
from mock_model import byte_tokenizer

from rorqual.engine import Engine
from rorqual.errors import RequestError
from rorqual.posttrain.rollouts import Rollout
from rorqual.posttrain.rollouts_agent import AgentPrompt, AgentRollouts

MOST_S = 120.0
"""No wait is longer, and all end with what they wait for."""


def told(groups: list[list[Rollout]]) -> list[Any]:
    """All of rollouts that training sees."""
    return [
        (one.id, one.trajectory.ids, one.trajectory.mask, one.trajectory.logprobs, one.reward, one.truncated,
         one.versions, [None if mask is None else mask.tolist() for mask in one.sampling_masks or ()])
        for group in groups for one in group
    ]  # fmt: skip


class Counting(AgentRollouts):
    """Knows how many attempts are under way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.busy, self.changed = 0, threading.Condition()

    def _attempt(self, *args: Any) -> Rollout:
        with self.changed:
            self.busy += 1
        try:
            return super()._attempt(*args)
        finally:
            with self.changed:
                self.busy -= 1
                self.changed.notify_all()

    def wait_idle(self) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.busy == 0, MOST_S)


LOGS: dict[str, str] = {}


def judge_and_keep(prompt: AgentPrompt, answer: Any, sandbox: Any) -> float:
    LOGS[sandbox.id] = sandbox.files.read("out/log")
    return judge(prompt, answer, sandbox)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("peace")
    with Engine(Choosing(reply), byte_tokenizer()) as engine:
        source = AgentRollouts(engine, folder / "runs", judge, tools=[SHELL], maker=Maker(folder / "boxes"), parallel=4)
        return told(list(source.generate(prompts(2), 3)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_preempted_at_random_moments(tmp_path: Path, peaceful: list[Any], seed: int) -> None:
    draw = random.Random(seed)
    LOGS.clear()
    made: list[Any] = []
    with Engine(Choosing(reply), byte_tokenizer()) as engine:
        source = Counting(
            engine, tmp_path / "runs", judge_and_keep, tools=[SHELL], maker=Maker(tmp_path / "boxes"), parallel=4
        )
        worker = threading.Thread(target=lambda: made.extend(told(list(source.generate(prompts(2), 3)))), daemon=True)
        worker.start()
        end = time.monotonic() + MOST_S
        while worker.is_alive() and time.monotonic() < end:
            worker.join(draw.expovariate(1 / 0.4))
            source.pause()
            assert source.wait_idle(), "a run did not hear that it is to stop"
            source.resume()
        source.resume()
        worker.join(MOST_S)
        assert not worker.is_alive(), "the rollouts hang"
    assert source.infra_failed == 0 and source.preemptions > 0
    assert made == peaceful
    assert len(LOGS) == 6 and all(len(text.split()) == 2 for text in LOGS.values())  # each call once


def test_a_later_run_s_failure_is_heard_while_an_earlier_one_rests(tmp_path: Path) -> None:
    """The first group waits for `resume`, which never comes."""
    resting = threading.Event()

    def failing(prompt: AgentPrompt, answer: Any, sandbox: Any) -> float:
        assert resting.wait(MOST_S)
        raise RequestError("the judge is broken", status=500)

    class Resting(AgentRollouts):
        def _rollout(self, prompt: AgentPrompt, group: int, *rest: Any) -> Rollout | None:
            if group == 0:
                while self._may_run.is_set() and not self._is_closed:
                    time.sleep(0.01)
                resting.set()
            return super()._rollout(prompt, group, *rest)

    with Engine(Choosing(reply), byte_tokenizer()) as engine:
        source = Resting(engine, tmp_path / "runs", failing, tools=[SHELL], maker=Maker(tmp_path / "boxes"))
        raised: list[BaseException] = []

        def run(groups: Iterator[list[Rollout]]) -> None:
            try:
                next(groups)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, args=(source.generate(prompts(2), 1),), daemon=True)
        original = source._judge

        def pausing(*args: Any) -> None:
            source.pause()  # the second run is past its last token, so it is not preempted
            original(*args)

        source._judge = pausing  # type: ignore[method-assign]
        thread.start()
        thread.join(MOST_S)
        assert not thread.is_alive(), "nobody heard of the failure"
    assert len(raised) == 1 and "judge is broken" in str(raised[0])
