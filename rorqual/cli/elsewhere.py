"""Options of `serve` for a model that runs on another server: attach to one, or launch vLLM or SGLang for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.server.launch import Launch
    from rorqual.server.upstream import UpstreamSettings
    from rorqual.server.upstream_wire import Offer

ELSEWHERE = "A model on another server"
KEY_VARIABLE = "RORQUAL_UPSTREAM_KEY"

Upstream = Annotated[
    str | None,
    typer.Option(
        "--upstream",
        help=f"Address of an OpenAI-style server that runs the model; its key in {KEY_VARIABLE}. MODEL gives the "
        "tokenizer and config.",
        rich_help_panel=ELSEWHERE,
    ),
]
UpstreamModel = Annotated[
    str | None,
    typer.Option("--upstream-model", help="Its name there; the first one otherwise.", rich_help_panel=ELSEWHERE),
]
UpstreamTimeout = Annotated[
    float,
    typer.Option("--upstream-timeout", help="Longest silence in an answer, in seconds.", rich_help_panel=ELSEWHERE),
]
ExternalEngine = Annotated[
    Literal["vllm", "sglang"] | None,
    typer.Option("--engine", help="Launch this engine for the model, and serve from it.", rich_help_panel=ELSEWHERE),
]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="GPUs for it.", rich_help_panel=ELSEWHERE)]
Spread = Annotated[
    Literal["tensor", "data"],
    typer.Option("--parallel", help="How its attention is spread over them.", rich_help_panel=ELSEWHERE),
]
EnginePort = Annotated[
    int, typer.Option("--engine-port", min=1, max=65535, help="Where it listens.", rich_help_panel=ELSEWHERE)
]
EngineArg = Annotated[
    list[str] | None,
    typer.Option("--engine-arg", help="A further flag for it; may be repeated.", rich_help_panel=ELSEWHERE),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the engine's command and leave.", rich_help_panel=ELSEWHERE)
]


@dataclass(frozen=True)
class Elsewhere:
    """The options, together. Raises: ConfigError for two that contradict each other."""

    model: str
    name: str | None
    upstream: str | None
    upstream_model: str | None
    timeout_s: float
    engine: Literal["vllm", "sglang"] | None
    gpus: int
    parallel: Literal["tensor", "data"]
    engine_port: int
    engine_args: list[str]
    context: int | None
    max_running: int

    def __post_init__(self) -> None:
        if self.upstream is not None and self.engine is not None:
            raise ConfigError(
                f"--upstream {self.upstream} attaches to a running server and --engine {self.engine} launches one. "
                "Leave one of them out."
            )
        if self.timeout_s <= 0:
            raise ConfigError(f"--upstream-timeout is {self.timeout_s}. Give seconds above 0.")
        if self.upstream is not None and not self.upstream.startswith(("http://", "https://")):
            raise ConfigError(f"--upstream is {self.upstream!r}. Give an address such as http://127.0.0.1:8100.")

    @property
    def is_wanted(self) -> bool:
        """Whether the model runs anywhere but here."""
        return self.upstream is not None or self.engine is not None

    def launch(self) -> "Launch":
        """What `--engine` starts. Raises: ConfigError without it."""
        from rorqual.server.launch import Launch

        if self.engine is None:
            raise ConfigError("--dry-run prints the command of an engine. Name one: --engine vllm or --engine sglang.")
        name = self.name or self.model.rstrip("/").rsplit("/", 1)[-1]
        return Launch(
            self.engine, self.model, name, self.gpus, self.engine_port, parallel=self.parallel, context=self.context,
            more=self.engine_args,
        )  # fmt: skip

    @contextmanager
    def open(self, model_context: int) -> "Iterator[UpstreamSettings]":
        """Attach to the upstream, or launch it and wait; ends what it launched. Raises: ConfigError."""
        from rorqual.server.launch import check_installed, running
        from rorqual.server.upstream_wire import connect

        if self.upstream is not None:
            url = self.upstream.rstrip("/").removesuffix("/v1")
            yield self._settings(url, connect(url, self._key, self.upstream_model), model_context)
            return
        launch = self.launch()
        check_installed(launch.engine)
        typer.echo(f"Launching {launch.engine}; it says itself how far it is:\n{launch.shown()}")
        with running(launch) as offer:
            yield self._settings(launch.url, offer, model_context)

    @property
    def _key(self) -> str | None:
        return os.environ.get(KEY_VARIABLE) or None

    def _settings(self, url: str, offer: "Offer", model_context: int) -> "UpstreamSettings":
        from rorqual.server.upstream import UpstreamSettings

        known = [limit for limit in (self.context, offer.context, model_context) if limit is not None]
        return UpstreamSettings(
            url=url, model=offer.model, dialect=offer.dialect, context_limit=min(known), key=self._key,
            patience_s=self.timeout_s, max_running=self.max_running,
        )  # fmt: skip
