"""Agents' tasks for a scripted model with a few choices of its own: two calls that write letters, and an answer."""

from typing import Any

import torch
from mock_model import ScriptModel, byte_tokenizer
from torch import Tensor

from rorqual.agents.loop import Answer
from rorqual.agents.tools import standard_tools
from rorqual.posttrain.rollouts_agent import AgentPrompt

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
