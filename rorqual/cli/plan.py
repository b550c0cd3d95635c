"""`rorqual plan`: what a model needs, what fits a machine, and how fast and at what price at best."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.inspect import find_model
from rorqual.cli.options import OUTPUT, Json
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.sizes import parse_tokens

if TYPE_CHECKING:
    from rorqual.planner.adapters import AdapterPlan
    from rorqual.planner.cache import CacheRows
    from rorqual.planner.tensors import WeightFormat

WORK, MACHINE, PRICE, TRAINING = "What is asked", "Machine", "Price", "Adapters"


def plan(
    model: Annotated[
        str, typer.Argument(help="A preset, a bundled model, a checkpoint folder or a config.json.", metavar="MODEL")
    ] = "v4-flash",
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="Tokens of each sequence: 8192, 128K (thousands), 1M (a million), 1Mi (2^20). 1M unless given.",
            rich_help_panel=WORK,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Sequences at once; as many as fit.", rich_help_panel=WORK)
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option(
            "--tpot-ms",
            help="Longest time between two tokens of a sequence, in milliseconds; limits the batch.",
            rich_help_panel=WORK,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", help="Number and name, such as 8xH200; list shows all.", rich_help_panel=MACHINE),
    ] = None,
    hardware_table: Annotated[
        Path | None,
        typer.Option("--hardware-table", help="Your own chips, as in planner/hardware.toml.", rich_help_panel=MACHINE),
    ] = None,
    reserve: Annotated[
        float,
        typer.Option("--reserve", help="Share of memory kept for everything else.", rich_help_panel=MACHINE),
    ] = 0.1,
    weights: Annotated[
        Literal["official", "base", "bf16", "fp32"] | None,
        typer.Option(
            "--weights",
            help="official (FP4 experts, FP8 projections), base (FP8 experts), bf16 or fp32.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    cache: Annotated[
        Literal["released", "fp8", "fp4-keys", "exact"] | None,
        typer.Option(
            "--cache",
            help="released (as V4 is served), or as rorqual keeps it in bf16: fp8, fp4-keys, exact.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    usd_per_hour: Annotated[
        float | None,
        typer.Option("--usd-per-hour", help="Price of a chip; else the table's.", rich_help_panel=PRICE),
    ] = None,
    cache_hit: Annotated[
        float,
        typer.Option("--cache-hit", help="Share of prompt tokens found in a prefix cache.", rich_help_panel=PRICE),
    ] = 0.0,
    output_share: Annotated[
        float, typer.Option("--output-share", help="Generated tokens among all.", rich_help_panel=PRICE)
    ] = 0.1,
    adapter: Annotated[
        int | None,
        typer.Option(
            "--adapter",
            min=1,
            metavar="RANK",
            help="Plan the training of a LoRA adapter instead.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    adapter_targets: Annotated[
        str | None,
        typer.Option(
            "--adapter-targets",
            help="Its modules, e.g. 'attn.*,experts.w?'; the projections of attention unless given.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    table: Annotated[
        Literal["plan", "report", "claims"],
        typer.Option(
            "--table",
            help="plan; report: the V4 report's figures beside ours; claims: published speeds beside bounds.",
            rich_help_panel=OUTPUT,
        ),
    ] = "plan",
    as_json: Json = False,
) -> None:
    """Plan for a model: bytes, what fits, the fastest that a machine can be and why, the least cost; beside V3.2 and
    grouped-query attention. Speeds are upper bounds, not forecasts.

    \b
    rorqual plan v4-flash --context 1M --hardware 8xH200
    rorqual plan v4-pro --context 8192 --hardware 64xascend-950dt --tpot-ms 20 --usd-per-hour 2
    rorqual plan v4-flash --adapter 16 --hardware 2xH200
    rorqual plan --hardware list
    rorqual plan --table report
    """
    from rorqual.cli import plan_json, plan_tables
    from rorqual.planner.compare import price_claims, speed_claims
    from rorqual.planner.hardware import find_machine, load_hardware
    from rorqual.planner.plan import Workload, make_plan
    from rorqual.planner.report import report_figures

    chips = load_hardware(hardware_table)
    found: Any
    if hardware == "list":
        show(plan_json.hardware(chips) if as_json else plan_tables.hardware(chips))
        return
    if table == "report":
        figures = report_figures()
        show(plan_json.report(figures) if as_json else plan_tables.report(figures))
        return
    if table == "claims":
        speeds = speed_claims(("v4-flash", "v4-pro"))
        show(plan_json.speeds(speeds) if as_json else plan_tables.speeds(speeds))
        return
    source, config, _ = find_model(model)
    if adapter is not None:
        machine = None if hardware is None else find_machine(hardware, chips)
        asked = 4096 if context is None else parse_tokens(context, "--context")
        found = plan_adapter(config, adapter, adapter_targets, stored_as(config, weights), asked)
        shown = plan_json.adapter if as_json else plan_tables.adapter
        show(shown(found, asked, machine, reserve))
        return
    length = min(10**6, config.max_position_embeddings) if context is None else parse_tokens(context, "--context")
    work = Workload(length, batch, None if tpot_ms is None else tpot_ms / 1e3, cache_hit, output_share)
    found = make_plan(
        config,
        model,
        work,
        None if hardware is None else find_machine(hardware, chips),
        weights=stored_as(config, weights),
        rows=kept_as(config, cache),
        reserve=reserve,
        usd_per_hour=usd_per_hour,
    )
    is_published = source == "preset" and hardware is not None
    fit = found.networks[0].fit
    speeds = speed_claims((model,)) if is_published else []
    prices = price_claims(model, None if fit is None else fit.costs) if is_published else []
    show(plan_json.plan(found, speeds, prices) if as_json else plan_tables.plan(found, speeds, prices))


def plan_adapter(
    config: ModelConfig, rank: int, targets: str | None, weights: "WeightFormat", tokens: int
) -> "AdapterPlan":
    """What training an adapter needs, with micro-batches of so many tokens."""
    from rorqual.model.adapters import AdapterSpec
    from rorqual.planner.adapters import adapter_plan
    from rorqual.posttrain.config import ATTENTION

    chosen = ATTENTION if targets is None else tuple(part.strip() for part in targets.split(",") if part.strip())
    return adapter_plan(config, AdapterSpec(rank, 2.0 * rank, chosen), weights=weights, tokens=tokens)


def show(found: Any) -> None:
    """A JSON object as one line, tables for people otherwise."""
    if isinstance(found, dict | list):
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    console = Console()
    for block in found:
        console.print(block, markup=False)


def is_released_kind(config: ModelConfig) -> bool:
    """Whether a model is meant to be stored and served as the released ones, with packed weights and cache."""
    return config.activation_rounding != "none"


def stored_as(config: ModelConfig, asked: str | None) -> "WeightFormat":
    """How weights are counted: as asked, as released for models of that kind, or in the model's own dtype."""
    words: dict[str, WeightFormat] = {"official": "official", "base": "base", "bf16": "bf16", "fp32": "fp32"}
    if asked is not None:
        return words[asked]
    return "official" if is_released_kind(config) else "fp32" if config.torch_dtype == "float32" else "bf16"


def kept_as(config: ModelConfig, asked: str | None) -> "CacheRows":
    """How the cache is counted: as asked, as released for models of that kind, or as rorqual keeps it."""
    from rorqual.planner.cache import own_rows, released_rows

    if asked == "released" or (asked is None and is_released_kind(config)):
        return released_rows(config)
    try:
        return own_rows(config if asked is None else config.replace(cache_format=asked))
    except ConfigError as error:
        raise ConfigError(f"--cache {asked} does not fit this model: {error}") from None
