"""Rewards by name, as a recipe gives them, and a user's own by dotted path.

A name with a dot (or colon) in it is a Python callable: `my_package.rewards:polite`. It is one of

* `f(answers) -> [score, ...]`, as all rewards here; numbers, None and `Score` may be mixed;
* `f(prompts, completions, completion_ids, **columns) -> [number, ...]`, TRL's form, known by any of the three names:
  the conversation, the answer's text (`[{"role": "assistant", "content": ...}]` where the prompt is a list of
  messages), its tokens, and the columns of the dataset's row, each repeated for every answer;
* a class or function that makes such a callable from the recipe's `options`.

The module is found where Python finds modules, the current folder among them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import TaskFamily
from rorqual.errors import ConfigError
from rorqual.posttrain.rewards.base import Answer, Reward, Score
from rorqual.posttrain.rewards.code import Code
from rorqual.posttrain.rewards.confidence import Brier
from rorqual.posttrain.rewards.form import Form
from rorqual.posttrain.rewards.graded import Abstention, Graded, grader_of
from rorqual.posttrain.rewards.judge import Agreement, Judge, JudgeModel, Rubric
from rorqual.posttrain.rewards.length import Brevity, BudgetAdherence, LengthPrice


@dataclass
class RewardSetting:
    """What rewards are made with. actor: the policy itself as a judge, for judges without an address of their own."""

    families: Mapping[str, TaskFamily] = field(default_factory=dict)
    actor: JudgeModel | None = None


def build_reward(name: str, options: Mapping[str, Any], setting: RewardSetting) -> Reward:
    """The reward `name` with its `options`.

    Raises: ConfigError for a name nobody knows, options it does not take, or a dotted path that leads nowhere.
    """
    if ":" in name or "." in name:
        return _own(name, options)
    if name not in BUILDERS:
        raise ConfigError(
            f"There is no reward {name!r}, only {', '.join(sorted(BUILDERS))}. Choose one of them, or give the dotted "
            "path of a Python function of your own, such as my_rewards:polite."
        )
    try:
        return BUILDERS[name](setting, **options)
    except TypeError as error:
        raise ConfigError(f"The reward {name!r} takes other options than {dict(options)}: {error}.") from None


def _graded(setting: RewardSetting) -> Reward:
    return Graded(grader_of(setting.families))


def _facts(setting: RewardSetting, penalty: float = 1.0) -> Reward:
    return Abstention(grader_of(setting.families), penalty=penalty)


def _brier(setting: RewardSetting) -> Reward:
    return Brier(grader_of(setting.families))


def _brevity(setting: RewardSetting, most: float = 0.5) -> Reward:
    return Brevity(_graded(setting), most=most)


def _judge(
    setting: RewardSetting, rubric: Sequence[tuple[str, float]], samples: int = 1, url: str = "", model: str = "",
    key_env: str = "", max_tokens: int = 1024,
) -> Reward:  # fmt: skip
    """url, model: a server's; without them the actor judges. key_env: the environment variable that holds its key."""
    judge = setting.actor
    if url:
        import os

        from rorqual.posttrain.rewards.judge_models import UrlJudge

        judge = UrlJudge(url, model, key=os.environ.get(key_env) if key_env else None, max_tokens=max_tokens)
    if judge is None:
        raise ConfigError("The reward 'judge' has neither an address nor an actor to judge with. Give it a url.")
    return Judge(judge, Rubric(tuple((str(text), float(weight)) for text, weight in rubric)), samples=samples)


BUILDERS: dict[str, Callable[..., Reward]] = {
    "arithmetic": _graded,
    "retrieval": _graded,
    "tools": _graded,
    "correct": _graded,
    "facts": _facts,
    "code": lambda setting, **options: Code(**options),
    "brier": _brier,
    "format": lambda setting, **options: Form(**options),
    "length": lambda setting, **options: LengthPrice(**options),
    "brevity": _brevity,
    "budget": lambda setting, **options: BudgetAdherence(**options),
    "judge": _judge,
    "agreement": lambda setting, **options: Agreement(**options),
}
"""By the names that recipes use. arithmetic, retrieval and tools are one grader: each family brings its own rules."""


def load_dotted(path: str) -> Any:  # Any: whatever stands there
    """The object at `package.module:name` or `package.module.name`. Raises: ConfigError where there is none."""
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing there hides an installed module
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path!r} names nothing that Python can find ({error}). Write package.module:name, and start from the "
            "folder that holds it, or install it."
        ) from error
    return found


_TRL_NAMES = {"prompts", "completions", "completion_ids"}


def _own(path: str, options: Mapping[str, Any]) -> Reward:
    found = load_dotted(path)
    if not callable(found):
        raise ConfigError(f"{path!r} is {type(found).__name__}, which cannot be called. Name a function or a class.")
    made = found(**options) if options or inspect.isclass(found) else found
    if not callable(made):
        raise ConfigError(f"{path!r} made {type(made).__name__}, which cannot be called. Return a function from it.")
    is_trl = not _TRL_NAMES.isdisjoint(inspect.signature(made).parameters)
    return partial(_call, path, partial(_call_as_trl, made) if is_trl else made)


def _call(path: str, made: Callable[[Sequence[Answer]], Sequence[Any]], answers: Sequence[Answer]) -> list[Score]:
    scores = [one if isinstance(one, Score) else Score(None if one is None else float(one)) for one in made(answers)]
    if len(scores) != len(answers):
        raise ConfigError(
            f"The reward {path} gave {len(scores)} scores for {len(answers)} answers. Return one for each answer."
        )
    return scores


def _call_as_trl(made: Callable[..., Sequence[Any]], answers: Sequence[Answer]) -> Sequence[Any]:
    columns: dict[str, list[Any]] = {}
    for name in answers[0].item.meta if answers else ():
        columns[name] = [answer.item.meta[name] for answer in answers]
    prompts: list[Any] = []
    completions: list[Any] = []
    for answer in answers:
        said = final_answer(answer.text, answer.item.thinking_mode)
        if answer.item.prompt is not None:
            prompts.append(answer.item.prompt)
            completions.append(answer.text)
        else:
            prompts.append(answer.item.messages)
            completions.append([{"role": "assistant", "content": said}])
    ids = [list(answer.ids) for answer in answers]
    return made(prompts=prompts, completions=completions, **{"completion_ids": ids, **columns})
