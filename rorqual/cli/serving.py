"""What `up` and `serve` share: look that everything needed is there, load, listen, say where."""

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import typer

from rorqual.cli.options import use_threads
from rorqual.errors import MissingExtraError

if TYPE_CHECKING:  # it brings torch, which takes seconds to import
    from rorqual.cli.elsewhere import Elsewhere
    from rorqual.engine import EngineSettings
    from rorqual.server.dashboard import Dashboard
    from rorqual.server.listen import Certificate
    from rorqual.server.logs import Style
    from rorqual.server.operations import Operations
    from rorqual.server.service import Behaviour
    from rorqual.server.upstream import UpstreamSettings

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "httpx2", "jsonschema_rs")


def start(
    model: str,
    *,
    host: str,
    port: int,
    name: str | None = None,
    revision: str = "2026-04",
    settings: "EngineSettings | None" = None,
    threads: int | None = None,
    weights: str | None = None,
    memory: str | None = None,
    cache_format: str | None = None,
    operations: "Operations | None" = None,
    behaviour: "Behaviour | None" = None,
    shown: "Dashboard | None" = None,
    certificate: "Certificate | None" = None,
    drain_s: float = 30.0,
    log_style: "Style" = "off",
    as_json: bool = False,
    elsewhere: "Elsewhere | None" = None,
) -> None:
    """Load `model` (bundled name, folder or Hub id) and serve it until Ctrl-C; prints where once it listens.

    elsewhere: where the model runs, if not here; of `model` only config.json and tokenizer.json are read then.

    settings: of the engine; without any, its own limits and a cache in memory. operations: accounts and limits.
    shown: what the dashboard shows.

    Raises: ConfigError when the address cannot be used, CheckpointError when the model cannot be loaded,
    MissingExtraError without the `serve` extra.
    """
    require_server()
    from rorqual.checkpoint import describe, load
    from rorqual.engine import CacheSettings, EngineSettings
    from rorqual.ops import native
    from rorqual.server import run
    from rorqual.server.auth import check_exposure
    from rorqual.server.listen import bind

    if operations is not None:
        check_exposure(host, operations.accounts.gatekeeper)
    bind(host, port).close()  # a taken port is better known before the model is loaded than after
    served_as = name or model.rstrip("/").rsplit("/", 1)[-1]

    def say_where(url: str) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "api": f"{url}/v1", "model": served_as}))
        else:
            typer.echo(f"{served_as} is at {url}   (API: {url}/v1; Ctrl-C stops it)")

    def serve(network: Any, tokenizer: Any, settings: "EngineSettings | UpstreamSettings") -> None:
        run(
            network,
            tokenizer,
            host=host,
            port=port,
            model_name=served_as,
            revision=revision,
            settings=settings,
            operations=operations,
            behaviour=behaviour,
            shown=shown,
            certificate=certificate,
            drain_s=drain_s,
            log_style=log_style,
            on_ready=say_where,
        )

    if elsewhere is not None:
        described = describe(model)
        with elsewhere.open(described.cfg.max_position_embeddings) as upstream:
            serve(described, described.tokenizer, upstream)
        return
    if not as_json:
        typer.echo(f"Loading {model} ...")
        if native.compiler() is None:
            typer.echo("No C compiler here: the plain torch code runs, which is slower. (apt install gcc)")
    use_threads(threads)
    network, tokenizer = load(model, weights=weights, memory=memory, cache=cache_format)
    serve(network, tokenizer, settings or EngineSettings(cache=CacheSettings()))


def require_server() -> None:
    """Raises: MissingExtraError without the `serve` extra."""
    absent = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if absent:
        raise MissingExtraError(
            f"{' and '.join(absent)} not installed, and the server is built on them. "
            'Install them with: pip install "rorqual[serve]"'
        )
