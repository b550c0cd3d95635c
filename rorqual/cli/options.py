"""Options that several commands share, written once so that they mean and read the same everywhere."""

from typing import Annotated, Literal

import typer

SAMPLING, MODEL, OUTPUT, NETWORK = "Sampling", "Model", "Output", "Network"

Effort = Literal["none", "low", "medium", "high", "max"]

ModelArgument = Annotated[
    str,
    typer.Argument(help="Bundled name, checkpoint folder, or Hub id.", show_default=True, metavar="MODEL"),
]
ModelOption = Annotated[
    str, typer.Option("--model", help="Bundled name, checkpoint folder, or Hub id.", rich_help_panel=MODEL)
]
Weights = Annotated[
    Literal["fp4", "fp4-int8", "fp4-bf16", "fp8", "int8", "bf16"] | None,
    typer.Option(
        "--weights",
        help="Keep matrices packed: fp4 (experts; the rest fp8, or -int8, -bf16), fp8, int8, bf16. Else unpacked.",
        rich_help_panel=MODEL,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="What the process may hold, such as 6GiB: experts stay on disk and are read as they are used.",
        rich_help_panel=MODEL,
    ),
]
CacheFormat = Annotated[
    Literal["auto", "exact", "fp4-keys", "fp8"] | None,
    typer.Option(
        "--cache-format",
        help="Keep a sequence's memory exact, with fp4 index keys, or with fp8 entries too.",
        rich_help_panel=MODEL,
    ),
]
IndexSearch = Annotated[
    Literal["exact", "grouped"],
    typer.Option(
        "--index-search",
        help="How the indexer finds entries: exact, or grouped, an approximation that is faster beyond 22,527 tokens.",
        rich_help_panel=MODEL,
    ),
]
Guard = Annotated[
    str,
    typer.Option(
        "--guard",
        help="Show queries of long texts more than the indexer picks: off, default, or sources with commas between.",
        rich_help_panel=MODEL,
    ),
]
EffortOption = Annotated[
    Effort | None,
    typer.Option("--effort", help="none, low, medium, high or max; none answers at once.", rich_help_panel=MODEL),
]
System = Annotated[str | None, typer.Option("--system", help="System message to begin with.", rich_help_panel=MODEL)]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads for the model; torch chooses otherwise.", rich_help_panel=MODEL),
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate/--no-speculate",
        help="Draft tokens, from the text and with an MTP module: the same output, sooner where it is easily foretold.",
        rich_help_panel=MODEL,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", min=1, help="Longest reply, reasoning included.", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", help="0 takes the likeliest token; higher is freer.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.", rich_help_panel=SAMPLING),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep at most this many tokens.", rich_help_panel=SAMPLING)]
MinP = Annotated[
    float,
    typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest.", rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same reply.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Stop before this text; may be given several times.", rich_help_panel=SAMPLING),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        help="Where the server listens; 0 takes a free port.",
        rich_help_panel=NETWORK,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON for machines instead of text for people.", rich_help_panel=OUTPUT),
]


def use_threads(count: int | None) -> None:
    """Let torch use `count` threads; None leaves its own choice."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
