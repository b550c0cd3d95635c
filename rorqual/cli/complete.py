"""`rorqual complete`: continue a text, or fill the gap between two pieces of one."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rorqual.cli.options import (
    OUTPUT,
    SAMPLING,
    CacheFormat,
    Json,
    Memory,
    MinP,
    ModelOption,
    Seed,
    Speculate,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    Weights,
)
from rorqual.cli.terminal import printable
from rorqual.errors import RequestError

TEXT = "Text"
CURSOR = "<CURSOR>"


def complete(
    file: Annotated[
        str | None, typer.Argument(help="File to complete at its cursor mark, or at its end; - is stdin.")
    ] = None,
    prefix: Annotated[str | None, typer.Option("--prefix", help="Text before the gap.", rich_help_panel=TEXT)] = None,
    suffix: Annotated[
        str | None,
        typer.Option("--suffix", help="Text after the gap; without it the prefix is continued.", rich_help_panel=TEXT),
    ] = None,
    cursor: Annotated[
        str, typer.Option("--cursor", help="What marks the cursor in FILE.", rich_help_panel=TEXT)
    ] = CURSOR,
    model: ModelOption = "minke",
    speculate: Speculate = False,
    threads: Threads = None,
    weights: Weights = None,
    memory: Memory = None,
    cache_format: CacheFormat = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest completion.", rich_help_panel=SAMPLING)
    ] = 128,
    temperature: Temperature = 0.2,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Print prefix and suffix around the completion.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: Json = False,
) -> None:
    """Complete code or text: after a prefix, between prefix and suffix, or at the cursor mark of a file.

    \b
    rorqual complete --prefix "def mean(values):" --suffix "    return total / len(values)"
    rorqual complete draft.py --whole
    """
    before, after = gap(file, prefix, suffix, cursor)

    from rorqual.chat import render_fim, suppressed_ids
    from rorqual.cli.talk import open_engine
    from rorqual.engine import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    with open_engine(model, threads, weights, cache_format, speculate, memory) as (engine, tokenizer):
        if after is None:
            ids = [tokenizer.bos_token_id, *tokenizer.encode(before, allow_special=False)]
        else:
            ids = tokenizer.encode_guarded(render_fim(before, after, add_default_bos_token=True).pieces())
        request = engine.submit(ids, params.replace(suppress_token_ids=suppressed_ids(tokenizer)))
        if not as_json:
            typer.echo(before if whole else "", nl=False)
            for event in request:
                typer.echo(printable(event.text), nl=False)
            typer.echo((after or "") if whole else "")
            return
        done = request.result()
    report = {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "seed": done.seed,
        "usage": {
            "prompt_tokens": done.usage.prompt_tokens,
            "completion_tokens": done.usage.completion_tokens,
        },
    }
    typer.echo(json.dumps(report, ensure_ascii=False))


def gap(file: str | None, prefix: str | None, suffix: str | None, cursor: str) -> tuple[str, str | None]:
    """The text before and after the gap; None after it where there is nothing to fill towards.

    Raises: RequestError when the request names no text, or two, or the file cannot be read.
    """
    if (file is None) == (prefix is None and suffix is None):
        raise RequestError(
            ("no text was given" if file is None else "both FILE and --prefix or --suffix were given")
            + ", so it is not clear what to complete. Give a FILE, or --prefix with or without --suffix."
        )
    if file is None:
        return prefix or "", suffix
    if not cursor:
        raise RequestError("--cursor is empty, so it marks no place. Give the text that stands at the cursor.")
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{file} cannot be read as UTF-8 text ({error}), so there is nothing to complete. Check the path."
        ) from None
    if text.count(cursor) > 1:
        raise RequestError(
            f"the cursor mark {cursor!r} stands {text.count(cursor)} times in {file}, but only one place "
            "can be completed. Leave one, or choose another mark with --cursor."
        )
    before, found, after = text.partition(cursor)
    return before, after if found else None
