"""`rorqual posttrain`: from a trained model and a recipe to a tuned one, stage by stage."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rorqual.errors import ConfigError

RECIPE, WHERE, OUTPUT = "What to do", "Where, and going on", "Output"


def posttrain(
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="TOML recipe, or the name of one in recipes/posttrain; of several, later ones win.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="One setting, e.g. stages.0.optim.lr=1e-4.", rich_help_panel=RECIPE),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model to begin from: a bundled name, a folder, a Hub id.", rich_help_panel=RECIPE),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run (run.folder).", rich_help_panel=WHERE)] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on: finished stages are passed over, one begun continues.", rich_help_panel=WHERE
        ),
    ] = False,
    show_config: Annotated[
        bool,
        typer.Option("--show-config", help="Print every setting with its meaning, and leave.", rich_help_panel=OUTPUT),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="JSON lines instead of a progress line.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Tune a trained model by a recipe; stop it any time, and go on with --resume.

    \b
    rorqual posttrain --recipe recipes/posttrain/sft.toml --run-dir runs/tuned
    rorqual posttrain --resume --run-dir runs/tuned
    """
    from rorqual.posttrain.recipe import load_recipe
    from rorqual.train.recipe_file import toml_value

    settings = list(setting or [])
    recipes = list(recipe or [])
    if resume and not recipes and run_dir is not None and (run_dir / "config.toml").is_file():
        recipes = [str(run_dir / "config.toml")]  # the run knows its own recipe
    if base is not None:
        settings.append(f"model.base={toml_value(base)}")
    if run_dir is not None:
        settings.append(f"run.folder={toml_value(str(run_dir))}")
    loaded = load_recipe(recipes, settings)
    if show_config:
        sys.stdout.write(loaded.to_toml())
        return
    if not recipes:
        raise ConfigError(
            "Nothing says what to do. A run needs a recipe, or --resume with the --run-dir of one that was begun. "
            "Try: rorqual posttrain --recipe recipes/posttrain/sft.toml --run-dir runs/tuned"
        )
    from rorqual.posttrain.run import run_recipe

    mode = "quiet" if quiet else "json" if json or not sys.stdout.isatty() else "rich"
    if not run_recipe(loaded, resume=resume, progress=mode).finished:
        raise typer.Exit(1)  # stopped by a signal
