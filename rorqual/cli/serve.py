"""`rorqual serve`: any checkpoint over HTTP, with the web page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rorqual.chat import REVISIONS
from rorqual.cli.elsewhere import (
    DryRun,
    Elsewhere,
    EngineArg,
    EnginePort,
    ExternalEngine,
    Gpus,
    Spread,
    Upstream,
    UpstreamModel,
    UpstreamTimeout,
)
from rorqual.cli.operating import (
    Aliases,
    AllowOrigin,
    ApiKeys,
    CertFile,
    DrainSeconds,
    EngineView,
    Evals,
    ForcedWhileThinking,
    KeepReasoning,
    KeyFile,
    KeyOfCert,
    LedgerOption,
    Limit,
    LogStyle,
    MaxBody,
    NoAuth,
    NoLedger,
    PriceAs,
    Prices,
    RequestsPerMinute,
    TokensPerMinute,
    UserLimit,
    build_behaviour,
    build_dashboard,
    build_operations,
    certificate,
)  # fmt: skip
from rorqual.cli.options import (
    MODEL,
    NETWORK,
    CacheFormat,
    Guard,
    IndexSearch,
    Json,
    Memory,
    ModelArgument,
    Port,
    Speculate,
    Threads,
    Weights,
)
from rorqual.cli.serving import require_server, start
from rorqual.errors import ConfigError
from rorqual.sizes import parse_bytes

if TYPE_CHECKING:  # it brings torch, which takes seconds to import
    from rorqual.engine import EngineSettings

LOAD, CACHE = "Load", "Cache"

Policy = Literal["full", "periodic", "zero"]


def serve(
    model: ModelArgument,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on; beyond this machine it takes keys, or --no-auth.",
            rich_help_panel=NETWORK,
        ),
    ] = "127.0.0.1",
    port: Port = 8000,
    max_running: Annotated[
        int,
        typer.Option("--max-running", min=1, help="Requests that run at a time.", rich_help_panel=LOAD),
    ] = 32,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue", min=1, help="Requests that may wait; one more is refused (429).", rich_help_panel=LOAD
        ),
    ] = 64,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Most tokens of prompt and output.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    state_bytes: Annotated[
        str | None,
        typer.Option(
            "--state-bytes",
            help="Most memory of running requests' states, such as 4GiB; no limit otherwise.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    cache_bytes: Annotated[
        str,
        typer.Option(
            "--cache-bytes", help="Memory for what later requests may share; 0: no cache.", rich_help_panel=CACHE
        ),
    ] = "1GiB",
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", help="Folder that keeps it over restarts.", rich_help_panel=CACHE),
    ] = None,
    cache_disk_bytes: Annotated[
        str, typer.Option("--cache-disk-bytes", help="Most bytes in that folder.", rich_help_panel=CACHE)
    ] = "8GiB",
    cache_writes: Annotated[
        str | None,
        typer.Option("--cache-writes-per-hour", help="Most bytes written there in an hour.", rich_help_panel=CACHE),
    ] = None,
    cache_policy: Annotated[
        Policy,
        typer.Option(
            "--cache-policy",
            help="Window checkpoints inside a text: at every page, every period, or none (run tokens again).",
            rich_help_panel=CACHE,
        ),
    ] = "zero",
    cache_period: Annotated[
        int | None,
        typer.Option("--cache-period", help="Tokens between checkpoints of `periodic`.", rich_help_panel=CACHE),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name clients ask for; the folder's otherwise.", rich_help_panel=MODEL),
    ] = None,
    revision: Annotated[
        str,
        typer.Option(
            "--revision",
            help=f"Prompt format it was trained with: {' or '.join(REVISIONS)}.",
            rich_help_panel=MODEL,
        ),
    ] = REVISIONS[0],
    upstream: Upstream = None,
    upstream_model: UpstreamModel = None,
    upstream_timeout: UpstreamTimeout = 600.0,
    engine: ExternalEngine = None,
    gpus: Gpus = 8,
    parallel: Spread = "tensor",
    engine_port: EnginePort = 8100,
    engine_arg: EngineArg = None,
    dry_run: DryRun = False,
    speculate: Speculate = False,
    threads: Threads = None,
    weights: Weights = None,
    memory: Memory = None,
    cache_format: CacheFormat = None,
    index_search: IndexSearch = "exact",
    guard: Guard = "off",
    api_key: ApiKeys = None,
    key_file: KeyFile = None,
    no_auth: NoAuth = False,
    ledger: LedgerOption = None,
    no_ledger: NoLedger = False,
    limit: Limit = None,
    user_limit: UserLimit = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    prices: Prices = None,
    price_as: PriceAs = None,
    allow_origin: AllowOrigin = None,
    max_body: MaxBody = "48MiB",
    ssl_certfile: CertFile = None,
    ssl_keyfile: KeyOfCert = None,
    drain_s: DrainSeconds = 30.0,
    alias: Aliases = None,
    keep_reasoning: KeepReasoning = True,
    force_while_thinking: ForcedWhileThinking = False,
    engine_view: EngineView = True,
    evals: Evals = None,
    verdicts: Annotated[
        Path | None,
        typer.Option(
            "--verdicts",
            help="Journal of a referee, whose verdicts /dashboard counts for all who may ask.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    log: LogStyle = "text",
    as_json: Json = False,
) -> None:
    """Serve a checkpoint over an OpenAI-style HTTP API, with the web page.

    \b
    rorqual serve minke
    rorqual serve runs/mine/model --name mine --port 8001
    rorqual serve minke --weights fp4 --cache-format fp8
    rorqual serve minke --max-running 32 --cache-dir cache --cache-bytes 4GiB
    rorqual serve minke --host 0.0.0.0 --key-file keys.txt --ssl-certfile cert.pem --ssl-keyfile key.pem --log json
    rorqual serve DeepSeek-V4-Flash --upstream http://gpu-host:8100
    rorqual serve DeepSeek-V4-Flash --engine vllm --gpus 4 --dry-run
    """
    if revision not in REVISIONS:
        raise ConfigError(
            f"--revision is {revision!r}, which is no prompt format known here. Use {' or '.join(REVISIONS)}."
        )
    if guard != "off" and (upstream is not None or engine is not None):
        raise ConfigError(
            "--guard works inside the engine of this process, and --upstream or --engine lets another server run the "
            "model. Leave one of them out."
        )
    settings = _settings(
        max_running, max_queue, context, state_bytes, cache_bytes, cache_dir, cache_disk_bytes, cache_writes,
        cache_policy, cache_period, speculate, index_search, guard,
    )  # fmt: skip
    require_server()
    elsewhere = Elsewhere(
        model, name, upstream, upstream_model, upstream_timeout, engine, gpus, parallel, engine_port, engine_arg or [],
        context, max_running,
    )  # fmt: skip
    if dry_run:
        typer.echo(elsewhere.launch().shown())
        return
    operations = build_operations(
        api_keys=api_key,
        key_file=key_file,
        no_auth=no_auth,
        ledger=ledger,
        no_ledger=no_ledger,
        limit=limit,
        user_limit=user_limit,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        prices=prices,
        price_as=price_as,
        allow_origin=allow_origin,
        max_body_bytes=parse_bytes(max_body, "--max-body"),
    )
    start(
        model,
        elsewhere=elsewhere if elsewhere.is_wanted else None,
        host=host,
        port=port,
        name=name,
        revision=revision,
        settings=settings,
        threads=threads,
        weights=weights,
        memory=memory,
        cache_format=cache_format,
        operations=operations,
        behaviour=build_behaviour(alias, keep_reasoning, force_while_thinking, engine_view),
        shown=build_dashboard(evals, verdicts),
        certificate=certificate(ssl_certfile, ssl_keyfile),
        drain_s=drain_s,
        log_style=log,
        as_json=as_json,
    )


def _settings(
    max_running: int,
    max_queue: int,
    context: int | None,
    state_bytes: str | None,
    cache_bytes: str,
    cache_dir: Path | None,
    cache_disk_bytes: str,
    cache_writes: str | None,
    cache_policy: Policy,
    cache_period: int | None,
    speculate: bool,
    index_search: str,
    guard: str,
) -> "EngineSettings":
    """The options as the engine takes them. Raises: ConfigError for sizes that are none, or options that clash."""
    from rorqual.engine import CacheSettings, EngineSettings

    memory_bytes = parse_bytes(cache_bytes, "--cache-bytes")
    if not memory_bytes and cache_dir is not None:
        raise ConfigError(
            "--cache-bytes 0 switches the cache off, and --cache-dir says where it is kept. Give it some memory, in "
            "which pages from disk are used, or leave the folder out."
        )
    cache = CacheSettings(
        memory_bytes=memory_bytes,
        folder=cache_dir,
        disk_bytes=parse_bytes(cache_disk_bytes, "--cache-disk-bytes"),
        write_bytes_per_hour=None if cache_writes is None else parse_bytes(cache_writes, "--cache-writes-per-hour"),
        windows=cache_policy,
        period=cache_period,
    )
    return EngineSettings(
        max_running=max_running,
        max_queued=max_queue,
        context_limit=context,
        max_state_bytes=None if state_bytes is None else parse_bytes(state_bytes, "--state-bytes"),
        cache=cache if memory_bytes else None,
        speculate=speculate,
        index_search=index_search,
        guard=guard,
    )
