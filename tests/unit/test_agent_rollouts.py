"""Rollouts with tools: an agent's run with its ids, drawn by an engine, rewarded by what it left in its sandbox."""

from pathlib import Path

import pytest
from agent_toy import SHELL, Choosing, judge, prompts, reply
from local_sandbox import Maker
from mock_model import byte_tokenizer

from rorqual.chat import suppressed_ids
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import RequestError
from rorqual.posttrain.rollouts import GIVEN, Rollout
from rorqual.posttrain.rollouts_agent import AgentRollouts


def letters_of(one: Rollout) -> str:
    text = byte_tokenizer().decode(one.answer)
    return "".join(part[0] for part in text.split("echo ")[1:])


def test_episodes_are_whole_and_rewarded_by_what_they_left(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with Engine(Choosing(reply), tokenizer) as engine:
        source = AgentRollouts(engine, tmp_path / "runs", judge, tools=[SHELL], maker=Maker(tmp_path / "sandboxes"))
        groups = list(source.generate(prompts(2), 3))
        with pytest.raises(RequestError, match="temperature"):
            next(source.generate(prompts(1), 2, SamplingParams(temperature=0)))
    assert [[one.id for one in group] for group in groups] == [[f"task{n}/{i}" for i in range(3)] for n in range(2)]
    assert len({letters_of(one) for group in groups for one in group}) > 1
    banned = set(suppressed_ids(tokenizer, thinking=True, tools=True))
    for one in (one for group in groups for one in group):
        letters = letters_of(one)
        assert len(letters) == 2 and one.reward == 2.0 * letters.count("b") and not one.truncated
        length = len(one.trajectory)
        assert one.sampling_masks is not None and len(one.versions) == len(one.sampling_masks) == length
        for chosen, version, mask in zip(one.trajectory.mask, one.versions, one.sampling_masks, strict=True):
            assert (version, mask is None) == ((0, False) if chosen else (GIVEN, True))
            assert mask is None or not banned & set(mask.tolist())
        given = tokenizer.decode(
            [i for i, chosen in zip(one.trajectory.ids, one.trajectory.mask, strict=True) if not chosen]
        )
        assert given.count("<tool_result>") == 2 and given.count("Write two letters.") == 1
