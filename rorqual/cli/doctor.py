"""`rorqual doctor`: one line for each thing about this machine that decides what works and how fast."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus_client", "httpx2", "jsonschema_rs"),
    "plots": ("matplotlib",),
    "hub": ("huggingface_hub",),
    "data": ("datasets", "pyarrow"),
    "gguf": ("gguf",),
    "agents": ("pypdf", "openpyxl", "mcp"),
    "gpu": ("triton",),
    "test": ("pytest", "hypothesis", "httpx2", "openai", "transformers", "deepseek_recipe"),
}
CORE = ("numpy", "safetensors", "tokenizers", "pydantic", "typer", "rich", "msgpack")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, and what to know or do about it."""

    name: str
    status: Literal["ok", "missing", "optional"]
    detail: str


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} at {sys.executable}"
    return Finding("python", "ok" if good else "missing", detail + ("" if good else "; 3.11 or newer is needed"))


def _core() -> Finding:
    absent = [name for name in CORE if importlib.util.find_spec(name) is None]
    if absent:
        return Finding("core packages", "missing", f"{', '.join(absent)} not installed; run: make install")
    return Finding("core packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in CORE))


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "missing", "not installed; run: make install")]
    import torch

    from rorqual.ops import device

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("torch", "ok", f"{torch.__version__} ({device.build()})"),
        Finding("device", "ok", device.describe()),
        Finding(
            "threads",
            "ok",
            f"torch uses {torch.get_num_threads()} of {cores} cores (OMP_NUM_THREADS changes it)",
        ),
    ]


def _kernels() -> Finding:
    try:
        from rorqual.ops import native
    except ImportError as error:
        return Finding("native kernels", "missing", f"cannot be looked for: {error}")
    command = native.compiler()
    if command is None:
        return Finding("native kernels", "optional", "no C compiler, so the slower torch code runs; apt install gcc")
    cc = " ".join(command)
    if native.load() is None:
        return Finding("native kernels", "optional", f"off, or {cc} could not build them; slower torch code runs")
    return Finding("native kernels", "ok", f"built by {cc} in {native.cache_folder()}")


def _bundled() -> Finding:
    try:
        from rorqual.checkpoint import bundled_names
    except ImportError as error:
        return Finding("bundled models", "missing", f"cannot be looked for: {error}")
    names = ", ".join(bundled_names())
    return Finding("bundled models", "ok" if names else "missing", names or "none; reinstall the package")


def _extra(name: str, packages: tuple[str, ...]) -> Finding:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        return Finding(f"extra {name}", "optional", f'{", ".join(absent)} absent; pip install "rorqual[{name}]"')
    return Finding(f"extra {name}", "ok", ", ".join(packages))


def examine() -> list[Finding]:
    """Everything `rorqual doctor` reports, in order."""
    return [
        _python(),
        _core(),
        *_torch(),
        _kernels(),
        _bundled(),
        *(_extra(name, packages) for name, packages in EXTRAS.items()),
    ]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check this machine: versions, threads, compiler, optional extras. Fails when a needed part is missing.

    \b
    rorqual doctor
    rorqual doctor --json
    """
    findings = examine()
    healthy = all(finding.status != "missing" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        colours = {"ok": "green", "missing": "red", "optional": "yellow"}
        table = Table(box=None, show_header=False, padding=(0, 1))
        for finding in findings:
            table.add_row(f"[{colours[finding.status]}]{finding.status}[/]", finding.name, escape(finding.detail))
        Console().print(table)
    if not healthy:
        raise typer.Exit(1)
