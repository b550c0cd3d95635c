"""Recipes of post-training: a model to begin from, and stages that follow each other.

    [model]
    base = "minke"

    [[stages]]
    kind = "sft"
    seq_len = 1024
    data = [{path = "chat.jsonl"}]
    [stages.optim]
    lr = 1e-4

Settings of a stage stand in its own table; `--set stages.0.optim.lr=3e-4` changes one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rorqual.errors import ConfigError
from rorqual.posttrain.config import RunConfig, Section, StageConfig
from rorqual.posttrain.registry import STAGES
from rorqual.train.recipe_file import check, read_tree, table

FOLDER = Path("recipes") / "posttrain"
"""Where recipes that are called by name lie: below the current folder, or beside the package's sources."""

_COMMAND = "rorqual posttrain"


class ModelSection(Section):
    """Which model."""

    base: str = Field(default="minke", description="A bundled model, a folder, or a Hub id to begin from.")


class PosttrainConfig(Section):
    """A whole recipe."""

    model: ModelSection = Field(default=ModelSection(), description="Which model.")
    run: RunConfig = Field(default=RunConfig(), description="The run itself.")
    stages: list[dict[str, Any]] = Field(default=[], description="What is done, one after the other.")


@dataclass(frozen=True)
class Recipe:
    """A recipe with its stages checked."""

    config: PosttrainConfig
    stages: list[StageConfig]

    def folder_of(self, number: int) -> str:
        """Name of a stage's folder, below the run's."""
        stage = self.stages[number]
        return f"{number + 1:02d}-{stage.name or stage.kind}"

    def to_toml(self) -> str:
        """The recipe with every setting under its description."""
        shared = self.config.model_copy(update={"stages": []})
        lines = [line for line in table(shared) if line != "stages = []" and "one after the other" not in line]
        for stage in self.stages:
            lines += ["", "[[stages]]", *table(stage, "stages.")]
        return "\n".join(lines).strip() + "\n"


def load_recipe(recipes: Sequence[str | Path] = (), settings: Iterable[str] = ()) -> Recipe:
    """Read recipes (files, or names of those in recipes/posttrain; later ones win) and apply `a.b=c` settings.

    Raises: ConfigError for an unreadable file, an unknown key, a stage of an unknown kind, or a bad value.
    """
    return recipe_of(read_tree([find_recipe(recipe) for recipe in recipes], settings))


def recipe_of(tree: Mapping[str, Any]) -> Recipe:
    """A checked recipe from nested plain values. Raises: as `load_recipe`."""
    config = check(PosttrainConfig, tree, what="The recipe", command=_COMMAND)
    stages = [_stage(number, values) for number, values in enumerate(config.stages)]
    recipe = Recipe(config, stages)
    names = [recipe.folder_of(number) for number in range(len(stages))]
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"A stage is called {name!r}, which is no name of a folder. Use letters and digits.")
    return recipe


def _stage(number: int, values: Mapping[str, Any]) -> StageConfig:
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in STAGES:
        raise ConfigError(
            f"stages.{number}.kind is {kind!r}, which is no algorithm here. Use one of {', '.join(STAGES)}."
        )
    where = f"stages.{number}."
    return check(STAGES[kind].config, values, what=f"Stage {number} of the recipe", command=_COMMAND, prefix=where)


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given as a path or by name. Raises: ConfigError when there is none."""
    path = Path(name).expanduser()
    if path.suffix == ".toml" or path.is_file():
        return path
    places = [Path.cwd() / FOLDER, Path(__file__).parents[2] / FOLDER]
    for place in places:
        if (place / f"{name}.toml").is_file():
            return place / f"{name}.toml"
    known = sorted({file.stem for place in places for file in place.glob("*.toml")})
    raise ConfigError(
        f"There is no recipe {str(name)!r}: no such file, and recipes/posttrain holds {', '.join(known) or 'none'}. "
        "Give the path of a .toml file."
    )
