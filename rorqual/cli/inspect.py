"""`rorqual inspect`: what a preset, a config file or a checkpoint is, layer by layer and tensor by tensor."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.config import LayerSpec, ModelConfig, preset_names
from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.checkpoint import CheckpointSummary
    from rorqual.planner import Inventory, ParameterCount

KINDS = {
    "sliding": "sliding window only",
    "csa": "compressed sparse attention (CSA), lightning indexer",
    "hca": "heavily compressed attention (HCA)",
}


def inspect(
    model: Annotated[
        str,
        typer.Argument(help="A preset, a bundled model, a checkpoint folder or a config.json.", metavar="MODEL"),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Explain a preset, a config or a checkpoint: layers, parameters, stored tensors, tokenizer.

    Fails when the weights do not fit the config, or the tokenizer is another model's.

    \b
    rorqual inspect v4-flash
    rorqual inspect path/to/checkpoint --json
    """
    from rorqual.planner import count_parameters, official_inventory

    source, config, summary = find_model(model)
    count = count_parameters(config)
    released = None if summary is not None else official_inventory(config)
    if as_json:
        typer.echo(json.dumps(_as_json(model, source, config, count, summary, released), indent=2))
    else:
        _print_tables(model, source, config, count, summary, released)
    if summary is not None and not summary.fits:
        raise typer.Exit(1)
    if summary is not None and summary.tokenizer.is_right is False:
        raise typer.Exit(1)


def find_model(name: str) -> "tuple[str, ModelConfig, CheckpointSummary | None]":
    """What `name` stands for: the kind of source, its config, and its files where it has weights."""
    from rorqual.checkpoint import ASSETS, bundled_names, summarise

    if not name:
        raise ConfigError("the name is empty, so it is not clear what is meant. Name a preset, a folder or a file.")
    is_bundled = name in bundled_names()
    folder = ASSETS / name if is_bundled else Path(name).expanduser()
    if is_bundled or folder.is_dir():
        summary = summarise(folder)
        return "bundled" if is_bundled else "folder", summary.config, summary
    if name in preset_names():
        return "preset", ModelConfig.preset(name), None
    if folder.is_file():
        return "file", ModelConfig.from_file(folder), None
    raise ConfigError(
        f"there is nothing called {name!r}: no preset, bundled model, folder or file has that "
        f"name. Presets: {', '.join(preset_names())}. Bundled models: {', '.join(bundled_names()) or 'none'}."
    )


# ---------------------------------------------------------------- for machines


def _as_json(
    name: str,
    source: str,
    config: ModelConfig,
    count: "ParameterCount",
    summary: "CheckpointSummary | None",
    released: "Inventory | None",
) -> dict[str, Any]:
    from rorqual.planner import bytes_by_component, expert_bandwidth

    out: dict[str, Any] = {
        "name": name,
        "source": source,
        "config": config.to_dict(),
        "layers": [_layer(spec) for spec in config.layers],
        "mtp_layers": [_layer(spec) for spec in config.mtp_layers],
        "parameters": asdict(count),
        "flops_per_expert_byte": expert_bandwidth(config).flops_per_byte,
    }
    if summary is not None:
        out["checkpoint"] = {
            "folder": str(summary.folder),
            "layout": summary.layout,
            "fits": summary.fits,
            "is_packed": summary.is_packed,
            "files": summary.files,
            "tensors": summary.tensors,
            "nbytes": summary.nbytes,
            "by_dtype": {dtype: asdict(share) for dtype, share in summary.by_dtype.items()},
            "by_component": bytes_by_component(summary.stored),
            "tokenizer": asdict(summary.tokenizer),
            "matching": summary.matching,
            "missing": summary.missing,
            "unexpected": summary.unexpected,
            "misshapen": [str(misfit) for misfit in summary.misshapen],
            "note": summary.note,
        }
    if released is not None:
        out["official_files"] = {
            "shards": len(released.shards),
            "tensors": len(released.tensors),
            "nbytes": released.nbytes,
            "elements": released.elements,
            "by_component": _shares(released.by_component),
            "by_dtype": _shares(released.by_dtype),
        }
    return out


def _shares(found: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"tensors": tensors, "nbytes": nbytes} for name, (tensors, nbytes) in found.items()}


def _layer(spec: LayerSpec) -> dict[str, Any]:
    routing = "hash" if spec.hash_routed else "learned"
    out = {"index": spec.index, "kind": spec.kind, "compress_ratio": spec.compress_ratio, "routing": routing}
    return {**out, "engram": True} if spec.engram else out


# ---------------------------------------------------------------- for people


def _print_tables(
    name: str,
    source: str,
    config: ModelConfig,
    count: "ParameterCount",
    summary: "CheckpointSummary | None",
    released: "Inventory | None",
) -> None:
    from rich.console import Console
    from rich.table import Table

    from rorqual.planner import expert_bandwidth

    def table(title: str) -> Table:
        return Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))

    shape = table(f"{name} ({source})")
    for label, value in (
        ("layers", f"{config.num_hidden_layers}, and {config.num_nextn_predict_layers} MTP"),
        ("hidden size", f"{config.hidden_size} in {config.hc_mult} residual streams ({config.residual})"),
        ("vocabulary", f"{config.vocab_size}"),
        (
            "attention",
            f"{config.num_attention_heads} heads x {config.head_dim}, window {config.sliding_window}",
        ),
        ("indexer", f"{config.index_n_heads} heads x {config.index_head_dim}, top {config.index_topk}"),
        (
            "experts",
            f"{config.num_experts_per_tok} of {config.n_routed_experts}, width "
            f"{config.moe_intermediate_size}, 1 shared",
        ),
        ("context", f"{config.max_position_embeddings} tokens"),
        (
            "expert exchange",
            f"1 GB/s feeds {expert_bandwidth(config).tflops_per_s_per_gb_per_s:.2f} TFLOP/s (FP8 there, BF16 back)",
        ),
    ):
        shape.add_row(label, value)

    if config.engram is not None:
        e = config.engram
        runs = " and ".join(", ".join(map(str, e.orders)).rsplit(", ", 1))
        where = "beside the weights" if e.placement == "device" else "in main memory"
        words = f"runs of {runs} tokens, {e.heads} heads x {e.head_dim}, {e.rows} rows or more each, {where}"
        shape.add_row("engram", f"{words} ({e.flavour})")

    schedule = table("Layer schedule")
    for kind, words in KINDS.items():
        indices = [spec.index for spec in config.layers if spec.kind == kind]
        if indices:
            schedule.add_row(f"{len(indices)}", words, spans(indices))
    remembering = [spec.index for spec in config.layers if spec.engram]
    if remembering:
        schedule.add_row(f"{len(remembering)}", "with an Engram memory before the attention", spans(remembering))
    hashed = [spec.index for spec in config.layers if spec.hash_routed]
    if hashed:
        schedule.add_row(f"{len(hashed)}", "of them with hash-routed experts", spans(hashed))

    parameters = table("Parameters")
    parameters.add_row("total", f"{count.total:,}", short(count.total))
    parameters.add_row("activated per token", f"{count.activated:,}", short(count.activated))
    parameters.add_row("with MTP", f"{count.with_mtp:,}", short(count.with_mtp))
    for part, number in sorted(count.by_component.items(), key=lambda item: -item[1]):
        parameters.add_row(f"  {part.replace('_', ' ')}", f"{number:,}", short(number))
    parameters.columns[1].justify = "right"

    console = Console()
    for block in (shape, schedule, parameters):
        console.print(block, markup=False)
    if summary is not None:
        console.print(_files_table(summary, table("Checkpoint")), markup=False)
    if released is not None:
        console.print(_released_table(released, table("As official files: FP4 experts, FP8 projections")), markup=False)


def _files_table(summary: "CheckpointSummary", table: Any) -> Any:
    table.add_row("folder", str(summary.folder))
    packed = ", FP8/FP4-packed" if summary.is_packed else ""
    table.add_row("layout", f"{summary.layout}{packed}")
    table.add_row("stored", f"{summary.tensors} tensors in {summary.files} file(s), {summary.nbytes / 1e6:,.1f} MB")
    for dtype, share in summary.by_dtype.items():
        table.add_row(f"  {dtype}", f"{share.tensors} tensors, {share.nbytes / 1e6:,.1f} MB")
    verdict = {True: "fits", False: "does NOT fit", None: "absent"}[summary.tokenizer.is_right]
    table.add_row("tokenizer", f"{verdict}: {summary.tokenizer.words}")
    table.add_row("match the config", f"{summary.matching}")
    if summary.note is not None:
        table.add_row("left out", summary.note)
    problems = {"missing": summary.missing, "unexpected": summary.unexpected}
    problems["misshapen"] = [str(misfit) for misfit in summary.misshapen]
    for label, names in problems.items():
        more = f"\n... and {len(names) - 10} more" if len(names) > 10 else ""
        table.add_row(label, "\n".join([f"{len(names)}" if names else "none", *names[:10]]) + more)
    _add_components(summary, table)
    return table


def _released_table(released: "Inventory", table: Any) -> Any:
    table.add_row("tensors", f"{len(released.tensors):,}", f"in {len(released.shards)} shards")
    table.add_row("bytes", f"{released.nbytes:,}", f"{released.nbytes / 2**30:,.2f} GiB")
    for shares in (released.by_dtype, released.by_component):
        for name, (tensors, nbytes) in shares.items():
            words = name if name.isupper() else name.replace("_", " ")
            table.add_row(f"  {words}", f"{nbytes:,}", f"{tensors:,} tensors")
    table.columns[1].justify = "right"
    return table


def short(number: int) -> str:
    """1234567 -> `1.23 M`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def spans(indices: Sequence[int]) -> str:
    """Ascending numbers as steps: [0, 1, 2, 5, 7, 9] -> `0 to 2, 5 to 9 by 2`."""
    out: list[str] = []
    rest = list(indices)
    while rest:
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        length = 1
        while length < len(rest) and rest[length] - rest[length - 1] == step:
            length += 1
        if length < 3:
            out.append(str(rest[0]))
            length = 1
        else:
            out.append(f"{rest[0]} to {rest[length - 1]}" + (f" by {step}" if step > 1 else ""))
        rest = rest[length:]
    return ", ".join(out)


def _add_components(summary: "CheckpointSummary", table: Any) -> None:
    """Bytes by component and dtype, scales with their weights."""
    from rorqual.planner import bytes_by_component

    table.add_row("bytes of", "")
    for part, shares in bytes_by_component(summary.stored).items():
        dtypes = ", ".join(f"{dtype} {nbytes / 1e6:,.2f}" for dtype, nbytes in sorted(shares.items()))
        table.add_row(f"  {part.replace('_', ' ')}", f"{sum(shares.values()) / 1e6:,.2f} MB: {dtypes}")
