"""What a stage of a recipe is given and gives back; `registry.py` lists the algorithms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rorqual.model import Transformer
from rorqual.posttrain.config import RunConfig, StageConfig
from rorqual.tokenizer import Tokenizer
from rorqual.train.report import ProgressLine


@dataclass
class StageContext:
    """What a stage works with.

    `model` has fp32 weights and is the stage's own: it may change and return it. `run.folder` is the stage's own
    folder, in which `Trainer` keeps its checkpoints. `resume`: go on from the newest of those (`Trainer.resume`).
    `line` tells people and machines how it goes. `should_stop` is true once a signal asked to stop: save, and return an
    outcome that is not finished.
    """

    model: Transformer
    tokenizer: Tokenizer
    base: Path
    """Folder that `model` was loaded from (a teacher or a reference may be read from it again)."""
    run: RunConfig
    resume: bool = False
    line: ProgressLine = field(default_factory=lambda: ProgressLine("quiet", 0))
    should_stop: Callable[[], bool] = lambda: False

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return Path(self.run.folder)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. The recipe's runner writes the model of a finished one."""

    model: Transformer
    finished: bool
    figures: dict[str, Any] = field(default_factory=dict)
    """The stage's best numbers, for the last lines of a run."""


class Stage(NamedTuple):
    """An algorithm: its section of a recipe, and what runs it."""

    config: type[StageConfig]
    run: Callable[[Any, StageContext], Outcome]  # the section is of `config`
