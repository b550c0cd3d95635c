"""A post-training run: the stages of a recipe one after the other, each in its own folder, stoppable and resumable.

Every stage begins from the folder of a model: the first from the recipe's, each later one from that which the stage
before it wrote. A stage whose `done.json` is there is finished and passed over; it is written after the model, so a
kill at any moment leaves a stage either finished or to be resumed from its newest checkpoint.
"""

import json
import os
import shlex
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rorqual import log
from rorqual.checkpoint import load, save_official
from rorqual.checkpoint.load import locate
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.posttrain import lora
from rorqual.posttrain.config import RunConfig, StageConfig
from rorqual.posttrain.recipe import Recipe
from rorqual.posttrain.registry import STAGES
from rorqual.posttrain.stages import StageContext
from rorqual.train.device import check_device
from rorqual.train.process import prepare_process, restored_globals, stop_signals
from rorqual.train.recipe_file import to_toml
from rorqual.train.report import ProgressLine, environment

logger = log.get(__name__)

DONE = "done.json"
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "world.json")
"""What travels with a model's weights."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    model_folder: Path | None
    """The last stage's model; None when the run stopped early."""
    stages: dict[str, dict[str, Any]]
    """Figures of the finished stages, by folder."""
    finished: bool


def run_recipe(recipe: Recipe, *, resume: bool = False, progress: str = "quiet") -> RunResult:
    """Run (or go on with) all stages. `progress` is `rich`, `json` or `quiet`.

    Raises: ConfigError when the folder holds a run already (without `resume`), a stage's settings are not those it was
    begun with, or there is nothing to run; CheckpointError for a model that cannot be loaded; and what stages raise.
    """
    run = recipe.config.run
    if not recipe.stages:
        raise ConfigError(
            "The recipe has no stages, so there is nothing to do. Add [[stages]] with a kind, such as sft."
        )
    check_device(run.device, 1)
    folder = Path(run.folder)
    _open(folder, recipe, resume)
    with restored_globals(), stop_signals() as stops:
        threads = run.threads or torch.get_num_threads()
        prepare_process(threads)
        with (folder / "env.json").open("a", encoding="utf-8") as file:
            file.write(json.dumps(environment(run.seed, run.device, threads, 1)) + "\n")
        return _stages(recipe, folder, progress, lambda: bool(stops))


def _stages(recipe: Recipe, folder: Path, progress: str, should_stop: Callable[[], bool]) -> RunResult:
    base = locate(recipe.config.model.base)
    figures: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(recipe.stages):
        name = recipe.folder_of(number)
        own = folder / name
        if (own / DONE).is_file():
            figures[name] = json.loads((own / DONE).read_text(encoding="utf-8"))
        else:
            is_begun = (own / "stage.toml").is_file()
            own.mkdir(parents=True, exist_ok=True)
            _write(own / "stage.toml", to_toml(stage))
            with ProgressLine(progress, 0) as line:
                done = _run_stage(stage, recipe.config.run, base, own, is_begun, line, should_stop)
                if done is None:
                    again = f"rorqual posttrain --resume --run-dir {shlex.quote(str(folder))}"
                    result = RunResult(folder, None, figures, False)
                    line.say(_end(result), f"Stopped in {name}; all is saved. Continue: {again}")
                    return result
                figures[name] = done
                line.say({"event": "stage", "stage": name, **done}, f"{name} is done: {own / 'model'}")
        base = own / "model"
    result = RunResult(folder, base, figures, True)
    with ProgressLine(progress, 0) as line:
        line.say(_end(result), f"Model: {base}. Try: rorqual chat {shlex.quote(str(base))}")
    return result


def _run_stage(
    stage: StageConfig,
    run: RunConfig,
    base: Path,
    own: Path,
    is_begun: bool,
    line: ProgressLine,
    should_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """Figures of the finished stage, or None where it was stopped."""
    model, tokenizer = load(base, dtype=torch.float32)
    context = StageContext(
        model, tokenizer, base, run.model_copy(update={"folder": str(own)}), is_begun, line, should_stop
    )
    if stage.lora is not None:
        if getattr(stage, "trainable", None):
            raise ConfigError(
                f"The stage {own.name} has both `lora` and `trainable`, which say differently what is trained. Leave "
                "one of them out."
            )
        lora.prepare(model, stage.lora, run.seed)
    outcome = STAGES[stage.kind].run(stage, context)
    if not outcome.finished:
        return None
    if stage.lora is not None:
        lora.finish(outcome.model, stage.lora, own, base=str(base))
    _export(outcome.model, base, own / "model", run.export_dtype)
    _write(own / DONE, json.dumps(outcome.figures, indent=2) + "\n")
    return outcome.figures


def _export(model: Transformer, base: Path, folder: Path, precision: Literal["fp32", "bf16", "fp8", "fp4"]) -> None:
    """The model in the official layout, with what travelled with `base`; whole or not at all."""
    draft = folder.with_name("model.draft")
    shutil.rmtree(draft, ignore_errors=True)
    if precision == "fp4" or precision == "fp8":
        save_official(model, draft, experts=precision)
    else:
        save_official(model, draft, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for name in _COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, draft / name)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _open(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Make the run's folder, or check that the run in it is the one to go on with."""
    is_run = (folder / "config.toml").is_file()
    if is_run and not resume:
        raise ConfigError(
            f"{folder} already holds a run. Starting again there would mix two runs. Add --resume to continue it, or "
            "choose another --run-dir."
        )
    if resume and not is_run:
        raise ConfigError(f"{folder} holds no run to resume. Check --run-dir, or leave out --resume.")
    if is_run:
        _check_base(folder / "config.toml", recipe)
    for number, stage in enumerate(recipe.stages):
        begun = folder / recipe.folder_of(number) / "stage.toml"
        if begun.is_file() and begun.read_text(encoding="utf-8") != to_toml(stage):
            raise ConfigError(
                f"The settings of stage {number} are not those of {begun}, with which it began, and its result would "
                "belong to neither. Put them back; or remove that folder and those after it to do the stages again."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "it is not writable")
        _write(folder / "config.toml", recipe.to_toml())
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot hold a run: {error.strerror or error}. A run writes its checkpoints and figures there. "
            "Choose another --run-dir, or correct the permissions."
        ) from None


def _check_base(config: Path, recipe: Recipe) -> None:
    before = tomllib.loads(config.read_text(encoding="utf-8")).get("model", {}).get("base")
    now = recipe.config.model.base
    if before != now:
        raise ConfigError(
            f"{config} says that the run began from {before!r}, and now it is {now!r}; its result would belong to "
            "neither. Put it back, or choose another --run-dir."
        )


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _end(result: RunResult) -> dict[str, Any]:
    return {
        "event": "end",
        "folder": str(result.folder),
        "model_folder": None if result.model_folder is None else str(result.model_folder),
        "finished": result.finished,
        "stages": result.stages,
    }
