"""Rorqual's task families as tasks of inspect_ai: our items as samples, our graders as scorers.

    inspect eval recipes/harnesses/inspect/families.py@facts -T count=100 --model openai-api/rorqual/minke

Only chat-mode items; `-T thinking=disabled` asks a V4 endpoint not to think, which is how these items were taught.
"""

from itertools import islice
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import CORRECT, INCORRECT, NOANSWER, PARTIAL, Score, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from rorqual.data.tasks import DEFAULT_WORLD, families
from rorqual.data.tasks.base import Item, TaskFamily

_ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser}
_LETTERS = {"C": CORRECT, "P": PARTIAL, "I": INCORRECT, "A": NOANSWER, "X": NOANSWER}


def _questions(family: TaskFamily, split: Any, seed: int, count: int) -> list[Item]:
    """The first `count` items that are asked without tools, in chat mode, by a system prompt and questions alone."""
    return list(islice(filter(_is_plain, family.items(split, seed)), count))


def _is_plain(item: Item) -> bool:
    return item.thinking_mode == "chat" and not item.tools and {m["role"] for m in item.messages} <= set(_ROLES)


@scorer(metrics=[accuracy(), stderr()])
def graded(family: TaskFamily, items: dict[str, Item]) -> Any:
    """Our grader's verdict; an abstention where it is right counts as correct."""

    async def score(state: TaskState, target: Target) -> Score:
        output = state.output.completion
        verdict = family.grade(items[str(state.sample_id)], output)
        value = CORRECT if verdict.passed else _LETTERS[verdict.grade]
        return Score(value=value, answer=output, explanation=verdict.reason or None)

    return score


def _task(name: str, split: str, seed: int, count: int, world: str, thinking: str | None) -> Task:
    family = families(world)[name]
    items = {item.id: item for item in _questions(family, split, seed, count)}
    samples = [
        Sample(id=key, input=_messages(item), target=item.gold, metadata=item.stratum) for key, item in items.items()
    ]
    return Task(
        dataset=MemoryDataset(samples, name=f"rorqual-{name}"),
        solver=generate(),
        scorer=graded(family, items),
        config=GenerateConfig(temperature=0, max_tokens=256, extra_body=thinking and {"thinking": {"type": thinking}}),
        metadata={**family.spec(), "split": split, "seed": seed},
    )


def _messages(item: Item) -> list[ChatMessage]:
    return [_ROLES[m["role"]](content=m["content"]) for m in item.messages]


@task
def facts(
    split: str = "test", seed: int = 0, count: int = 100, world: str = DEFAULT_WORLD, thinking: str | None = None
) -> Task:
    """What the model knows about its invented world, and whether it says so when it does not."""
    return _task("facts", split, seed, count, world, thinking)


@task
def arith(split: str = "test", seed: int = 0, count: int = 100, thinking: str | None = None) -> Task:
    """Sums, differences, products and chains."""
    return _task("arith", split, seed, count, DEFAULT_WORLD, thinking)


@task
def needle(
    split: str = "test", seed: int = 0, count: int = 100, world: str = DEFAULT_WORLD, thinking: str | None = None
) -> Task:
    """The value of a key in a text."""
    return _task("needle", split, seed, count, world, thinking)


@task
def code(split: str = "test", seed: int = 0, count: int = 100, thinking: str | None = None) -> Task:
    """A Python function from one sentence."""
    return _task("code", split, seed, count, DEFAULT_WORLD, thinking)
