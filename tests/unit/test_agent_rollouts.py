"""Rollouts with tools: an agent's run with its ids, drawn by an engine, rewarded by what it left in its sandbox."""

from pathlib import Path
from typing import Any

import pytest
import torch
from local_sandbox import Maker
from mock_model import ScriptModel, byte_tokenizer
from torch import Tensor

from rorqual.agents.loop import Answer
from rorqual.agents.tools import standard_tools
from rorqual.chat import suppressed_ids
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import RequestError
from rorqual.posttrain.rollouts import GIVEN, Rollout
from rorqual.posttrain.rollouts_agent import AgentPrompt, AgentRollouts

CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="shell">\n<｜DSML｜parameter name="command" string="true">'
    "echo {} >> out/log</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
LETTERS = "abcd"
SHELL = next(tool for tool in standard_tools() if tool.name == "shell")


def reply(prompt: str) -> str:
    """Two calls that each write a letter of the model's choice (`?`), then an answer."""
    turns = prompt.count("<tool_result>")
    return f"Go.</think>{CALL.format('?')}" if turns < 2 else "Sure.</think>Done."


class Choosing(ScriptModel):
    """Says its script, and where that has a `?` draws one of the letters."""

    def forward_streams(self, tokens: Tensor, *, state: Any) -> Tensor:
        state.ids += tokens[0].tolist()
        rows = torch.zeros(tokens.shape[1], self.cfg.vocab_size)
        rows[-1] = self.logits_after(state.ids)  # nobody asks what follows within a prompt
        return rows[None]

    def logits_after(self, ids: list[int]) -> Tensor:
        logits = super().logits_after(ids)
        letters = [byte_tokenizer().encode(letter)[0] for letter in LETTERS]
        open_place = byte_tokenizer().encode("?")[0]
        if logits[open_place] > 0:
            logits[open_place] = 0.0
            logits[letters] = torch.tensor([50.0, 50.5, 51.0, 49.0])
        return logits


def prompts(count: int) -> list[AgentPrompt]:
    ask = {"role": "user", "content": "Write two letters."}
    return [AgentPrompt(f"task{n}", [{"role": "system", "content": "Work."}, ask]) for n in range(count)]


def judge(prompt: AgentPrompt, answer: Answer, sandbox: Any) -> float:
    """Two points for each `b` in the file, if the run came to its end."""
    return 2.0 * sandbox.files.read("out/log").count("b") if answer.ending == "done" else 0.0


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
