"""`rorqual referee calibrate`: how sure an endpoint's answers are, learnt from somebody's own labelled questions."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual.cli.elsewhere import KEY_VARIABLE
from rorqual.cli.options import OUTPUT, Json
from rorqual.cli.serving import require_server

if TYPE_CHECKING:
    from rorqual.evals.calibrate import Calibration, Labelled
    from rorqual.referee.confidence import UrlSource


def calibrate(
    upstream: Annotated[str, typer.Option("--upstream", help=f"Address of the endpoint; its key in {KEY_VARIABLE}.")],
    file: Annotated[
        Path, typer.Option("--set", help="Your questions: JSON Lines with question and answer (null: nobody can know).")
    ],
    model_name: Annotated[str, typer.Option("--model-name", help="The model's name there.")],
    paraphrases: Annotated[
        int, typer.Option("--paraphrases", min=0, max=10, help="Other wordings asked of each question.")
    ] = 2,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Answers drawn for each, for their entropy.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Where the calibration goes.", rich_help_panel=OUTPUT)] = Path(
        "confidence.json"
    ),
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit a confidence to an endpoint, on one half of your questions, and say on the other half how good it is.

    \b
    rorqual referee calibrate --upstream https://api.deepseek.com --model-name deepseek-v4-flash --set my.jsonl
    rorqual referee --upstream https://api.deepseek.com --mode enforce --confidence confidence.json \
      --confidence-model deepseek-v4-flash

    Needs some hundred questions, and answers with log probabilities. It is valid for this model of this endpoint alone.
    """
    require_server()
    from rorqual.evals.calibrate import FORCED, read_labelled
    from rorqual.referee.confidence import UrlSource

    questions = read_labelled(file.expanduser())
    source = UrlSource(upstream, model_name, os.environ.get(KEY_VARIABLE) or None, system=FORCED)
    found = asyncio.run(_asked(source, questions, paraphrases, samples, is_shown=not quiet and sys.stderr.isatty()))
    saved = found.calibrator.save(out)
    thresholds = {f"{one.alpha:g}": one.threshold for one in found.promises}
    if as_json:
        told = {"file": str(saved), "figures": found.figures, "declined": found.num_declined, "calls": found.calls}
        typer.echo(json.dumps(told | {"thresholds": thresholds}))
        return
    for name, value in found.figures.items():
        typer.echo(f"{name:10} {'-' if value is None else format(value, '.4g')}")
    for alpha, threshold in thresholds.items():
        typer.echo(f"of answers that are wrong at most {float(alpha):.0%} are given above p = {threshold:.3f}")
    typer.echo(f"{found.calls} calls, {found.num_declined} questions declined; {saved}")


async def _asked(
    source: "UrlSource", questions: "list[Labelled]", paraphrases: int, samples: int, *, is_shown: bool
) -> "Calibration":
    from rorqual.cli.eval import progress
    from rorqual.evals.calibrate import calibrate as fit_to

    try:
        with progress(is_shown) as show:
            return await fit_to(
                source, questions, paraphrases=paraphrases, samples=samples,
                progress=lambda done, total: show("asking", done, total),
            )  # fmt: skip
    finally:
        await source.close()
