"""`rorqual train`: from a recipe or a preset to a run folder with a trained model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rorqual.errors import ConfigError

RECIPE, WHERE, OUTPUT = "What to train", "Where, and going on", "Output"


def train(
    recipe: Annotated[
        list[Path] | None,
        typer.Option("--recipe", "-r", help="TOML recipe; of several, later ones win.", rich_help_panel=RECIPE),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="One setting, e.g. optim.lr=1e-3.", rich_help_panel=RECIPE),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Architecture: minke, bryde, sei, ...", rich_help_panel=RECIPE)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help='Corpus instead of the recipe\'s: a text file, a folder, a .jsonl file, or "python".',
            rich_help_panel=RECIPE,
        ),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run (run.folder).", rich_help_panel=WHERE)] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to share the work among (run.processes).", rich_help_panel=WHERE),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint.", rich_help_panel=WHERE)
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume although settings changed; the result then differs from the uninterrupted run.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    show_config: Annotated[
        bool,
        typer.Option("--show-config", help="Print every setting with its meaning, and leave.", rich_help_panel=OUTPUT),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Only write report.html of the run in this folder anew.", rich_help_panel=OUTPUT),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="Only lay runs over each other: name two or more folders; compare.html comes into the first.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON lines instead of a progress line.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Train a model from a recipe; stop it any time, and go on with --resume.

    \b
    rorqual train --recipe recipes/minke.toml --run-dir runs/minke
    rorqual train --preset minke --data my_texts/ --set schedule.total_tokens=5000000
    """
    if report is not None or compare:
        from rorqual.train.run_report import write_comparison, write_report

        page = write_report(report) if report is not None else write_comparison(compare or [])
        sys.stdout.write(f"{page}\n")
        return
    from rorqual.train.recipe_file import load_config, to_toml, toml_value

    settings = list(setting or [])
    recipes = [str(path) for path in recipe or []]
    if resume and not recipes:
        folder = run_dir if run_dir is not None else Path(load_config([], settings).run.folder)
        if (folder / "config.toml").is_file():
            recipes = [str(folder / "config.toml")]  # the run knows its own recipe
            settings.insert(0, f"run.folder={toml_value(str(folder))}")  # it may have been moved since
    if preset is not None:
        settings.append(f"model.preset={preset}")
    if run_dir is not None:
        settings.append(f"run.folder={toml_value(str(run_dir))}")
    if nproc is not None:
        settings.append(f"run.processes={nproc}")
    if data:
        settings.append(f"data.sources=[{', '.join(toml_value(_source(spec)) for spec in data)}]")
    config = load_config(recipes, settings)
    if show_config:
        sys.stdout.write(to_toml(config))
        return
    if not recipes and preset is None and not data and not resume:
        raise ConfigError(
            "Nothing says what to train. A run needs a recipe, a preset or a corpus. "
            "Try: rorqual train --recipe recipes/minke.toml --run-dir runs/minke"
        )
    from rorqual.train.loop import train as run_training

    mode = "quiet" if quiet else "json" if json or not sys.stdout.isatty() else "rich"
    result = run_training(config, resume=resume, allow_changes=allow_changes, progress=mode)
    if not result.finished and config.run.max_steps is None:
        raise typer.Exit(1)  # stopped by a signal


def _source(spec: str) -> dict[str, str]:
    if spec == "python":
        return {"kind": "python"}
    return {"kind": "jsonl" if spec.endswith(".jsonl") else "path", "path": spec}
