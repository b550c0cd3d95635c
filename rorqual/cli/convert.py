"""`rorqual convert`: a checkpoint from one layout to another, with bounded memory, resumable and verified."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.options import OUTPUT, Json
from rorqual.cli.progress import byte_progress
from rorqual.errors import ConfigError
from rorqual.sizes import parse_bytes

if TYPE_CHECKING:
    from rorqual.checkpoint import Conversion

FORMAT = "Format"
_LABELS = {"check": "checking finished files", "write": "writing", "verify": "verifying"}


def convert(
    source: Annotated[str, typer.Argument(help="Bundled name, checkpoint folder, or Hub id.", metavar="SOURCE")],
    target: Annotated[
        str, typer.Argument(help="Folder to write, new or empty; for gguf a new file.", metavar="TARGET")
    ],
    to: Annotated[
        Literal["official", "transformers", "gguf"],
        typer.Option(
            "--to", help="DeepSeek's own layout, that of transformers, or llama.cpp's.", rich_help_panel=FORMAT
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="Store numbers in this dtype; otherwise as they are.", rich_help_panel=FORMAT),
    ] = None,
    experts: Annotated[
        Literal["fp4", "fp8"] | None,
        typer.Option(
            "--experts",
            help="Pack experts in FP4 or FP8 and projections in FP8, as the released or base checkpoints are.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    drop_mtp: Annotated[
        bool,
        typer.Option("--drop-mtp", help="Leave mtp.* out, an MTP module or a drafter.", rich_help_panel=FORMAT),
    ] = False,
    shard_bytes: Annotated[
        str, typer.Option("--shard-bytes", help="Split above this size.", rich_help_panel=FORMAT)
    ] = "5GB",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Read everything back and compare it with the source.", rich_help_panel=OUTPUT
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint between DeepSeek's layout and that of transformers, or to GGUF, a matrix at a time.

    An interrupted conversion goes on with the same command: finished files are kept (a GGUF is one file).

    \b
    rorqual convert DeepSeek-V4-Flash flash-transformers --to transformers
    rorqual convert flash-transformers flash-official --to official --experts fp4
    rorqual convert DeepSeek-V4-Flash flash.gguf --to gguf
    """
    import torch

    from rorqual.checkpoint import convert as run
    from rorqual.checkpoint import locate

    if not target:  # an unset variable of a shell, say; a path would make the present folder of it
        raise ConfigError("the target's name is empty, so it is not clear where to write. Name a folder.")
    place = Path(target).expanduser()
    if to == "gguf":
        if dtype is not None or experts is not None or drop_mtp:
            raise ConfigError(
                "--dtype, --experts and --drop-mtp are for the other layouts: a GGUF file keeps what is stored (FP4 as "
                "MXFP4, FP8 as BF16) and never has MTP. Leave them out."
            )
        _to_gguf(locate(source), place, verify, as_json)
        return

    limit = parse_bytes(shard_bytes, "--shard-bytes")
    if limit < 1:
        raise ConfigError("--shard-bytes is 0, but a file holds at least one tensor. Give a size such as 5GB.")
    with byte_progress(not as_json, _LABELS) as on_bytes:
        done = run(
            locate(source),
            place,
            to,
            dtype=None if dtype is None else getattr(torch, dtype),
            experts=experts,
            drop_mtp=drop_mtp,
            verify=verify,
            shard_bytes=limit,
            on_bytes=on_bytes,
        )
    if as_json:
        typer.echo(json.dumps(_as_json(done), indent=2))
    else:
        typer.echo("\n".join(_lines(done)))


def _to_gguf(source: Path, target: Path, verify: bool, as_json: bool) -> None:
    from rorqual.checkpoint.gguf_export import export_gguf

    with byte_progress(not as_json, _LABELS) as on_bytes:
        done = export_gguf(source, target, verify=verify, on_bytes=on_bytes)
    if as_json:
        typer.echo(json.dumps({**done._asdict(), "path": str(done.path)}, indent=2))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.tensors.items()))
    typer.echo(f"{done.path}: {done.nbytes / 1e6:,.1f} MB, tensors: {kinds}")
    typer.echo("not verified (--no-verify)" if done.verified is None else f"read back: all {done.verified} exact")
    if done.left_out:
        typer.echo(f"left out, which llama.cpp has no use for: {', '.join(done.left_out)}")


def _as_json(done: "Conversion") -> dict[str, Any]:
    return {
        "source": str(done.source),
        "target": str(done.target),
        "files": [path.name for path in done.files],
        "kept": done.kept,
        "nbytes": done.nbytes,
        "verified": None if done.verified is None else asdict(done.verified),
    }


def _lines(done: "Conversion") -> list[str]:
    kept = f", {done.kept} of them from an earlier run" if done.kept else ""
    lines = [f"{done.target}: {len(done.files)} file(s){kept}, {done.nbytes / 1e6:,.1f} MB"]
    if done.verified is None:
        return [*lines, "not verified (--no-verify)"]
    found = done.verified
    lines.append(f"read back: {found.files} file(s) as written; {found.exact} of {found.matrices} matrices exact")
    for cast, loss in found.loss.items():
        lines.append(
            f"  {cast}: {loss.tensors} matrices changed, {loss.values:,} of their {loss.of:,} numbers, by at most "
            f"{loss.largest_relative:.2e} of a matrix's largest ({loss.worst})"
        )
    return [*lines, "nothing was lost"] if found.is_lossless else lines
