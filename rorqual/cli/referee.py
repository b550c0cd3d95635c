"""`rorqual referee`: checks and repairs the answers of any OpenAI-style endpoint on their way."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rorqual.cli.elsewhere import KEY_VARIABLE
from rorqual.cli.operating import (
    AllowOrigin,
    ApiKeys,
    CertFile,
    DrainSeconds,
    Evals,
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
    build_dashboard,
    build_operations,
    certificate,
)
from rorqual.cli.options import NETWORK, Json, Port
from rorqual.cli.referee_calibrate import calibrate
from rorqual.cli.referee_judging import (
    JUDGING,
    Checks,
    JudgeModel,
    JudgeUrl,
    RunCode,
    Sources,
    checks_with,
    code_runner,
    judge_server,
    retriever_of,
)
from rorqual.cli.referee_trial import trial
from rorqual.cli.serving import require_server
from rorqual.errors import ConfigError
from rorqual.sizes import parse_bytes

if TYPE_CHECKING:
    from rorqual.referee import Continuity
    from rorqual.referee.confidence import CalibratedConfidence

ROUNDS, RECORD = "Asking again", "Record"


referee = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    subcommand_metavar="[trial|calibrate ...]",
)


@referee.callback()
def stand(
    context: typer.Context,
    upstream: Annotated[
        str | None,
        typer.Option(
            "--upstream",
            help=f"Address of the endpoint; its key in {KEY_VARIABLE}, or else the one each client sends.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Literal["observe", "annotate", "enforce"],
        typer.Option(
            "--mode",
            help="observe: pass on and record. annotate: repair and tell. enforce: nothing broken goes out.",
            rich_help_panel=JUDGING,
        ),
    ] = "observe",
    profile: Annotated[
        Literal["chat", "assistant", "regulated"] | None,
        typer.Option("--profile", help="How careful to be; the policy's, or assistant.", rich_help_panel=JUDGING),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="TOML file: forbidden calls, other names of tools.", rich_help_panel=JUDGING),
    ] = None,
    confidence: Annotated[
        Path | None,
        typer.Option(
            "--confidence",
            help="A calibration of `referee calibrate`: answers that are too unsure are withheld or marked.",
            rich_help_panel=JUDGING,
        ),
    ] = None,
    confidence_model: Annotated[
        str | None,
        typer.Option("--confidence-model", help="The model it was made for.", rich_help_panel=JUDGING),
    ] = None,
    check: Checks = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    run_code: RunCode = None,
    sources: Sources = None,
    stream: Annotated[
        Literal["buffer", "holdback", "annotate_after"] | None,
        typer.Option("--stream", help="How streams go out; buffer with enforce.", rich_help_panel=JUDGING),
    ] = None,
    max_rounds: Annotated[
        int, typer.Option("--max-rounds", min=0, max=8, help="Times to ask again.", rich_help_panel=ROUNDS)
    ] = 2,
    token_ratio: Annotated[
        float,
        typer.Option(
            "--token-ratio", min=0, help="Tokens that may take, of the first answer's.", rich_help_panel=ROUNDS
        ),
    ] = 0.5,
    wall_ms: Annotated[
        float, typer.Option("--wall-ms", min=0, help="Time it may take.", rich_help_panel=ROUNDS)
    ] = 20_000.0,
    fallback: Annotated[
        list[str] | None,
        typer.Option(
            "--fallback", help="Model asked when the request's own fails; repeatable.", rich_help_panel=ROUNDS
        ),
    ] = None,
    constrain: Annotated[
        bool,
        typer.Option(
            "--constrain/--no-constrain",
            help="Ask again with strict tool schemas, where taken.",
            rich_help_panel=ROUNDS,
        ),
    ] = True,
    upstream_timeout: Annotated[
        float, typer.Option("--upstream-timeout", help="Longest silence, in seconds.", rich_help_panel=NETWORK)
    ] = 600.0,
    keep_reasoning: Annotated[
        bool,
        typer.Option(
            "--keep-reasoning/--no-keep-reasoning",
            help="Put reasoning and calls back that a client dropped or respelled.",
            rich_help_panel=JUDGING,
        ),
    ] = True,
    missing_reasoning: Annotated[
        Literal["rethink", "error"],
        typer.Option(
            "--missing-reasoning",
            help="Reasoning nobody has any more: go on without, or refuse.",
            rich_help_panel=JUDGING,
        ),
    ] = "rethink",
    continuity: Annotated[
        str | None,
        typer.Option(
            "--continuity",
            metavar="FOLDER|memory",
            help="Where reasoning is kept, encrypted; in your data folder otherwise.",
            show_default=False,
            rich_help_panel=RECORD,
        ),
    ] = None,
    continuity_size: Annotated[
        str, typer.Option("--continuity-size", help="Most that is kept.", rich_help_panel=RECORD)
    ] = "256MiB",
    continuity_hours: Annotated[
        float,
        typer.Option(
            "--continuity-hours", min=0.01, help="Unused for so long, it is forgotten.", rich_help_panel=RECORD
        ),
    ] = 168.0,
    journal: Annotated[
        Path | None,
        typer.Option("--journal", help="Folder of the record; in your data folder otherwise.", rich_help_panel=RECORD),
    ] = None,
    no_journal: Annotated[bool, typer.Option("--no-journal", help="Keep no record.", rich_help_panel=RECORD)] = False,
    texts: Annotated[
        bool,
        typer.Option(
            "--texts", help="Keep conversations too, what looks like a secret hidden.", rich_help_panel=RECORD
        ),
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on; beyond this machine it takes keys, or --no-auth.",
            rich_help_panel=NETWORK,
        ),
    ] = "127.0.0.1",
    port: Port = 8100,
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
    evals: Evals = None,
    log: LogStyle = "text",
    as_json: Json = False,
) -> None:
    """Check, repair and record the answers of any OpenAI-style endpoint on their way to its clients.

    \b
    rorqual referee --upstream https://api.deepseek.com
    rorqual referee --upstream http://127.0.0.1:8000 --mode enforce --profile regulated
    rorqual referee trial --upstream https://api.deepseek.com --set my.jsonl
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    require_server()
    from rorqual.folders import data_folder
    from rorqual.referee import Options, Referee, load_policy
    from rorqual.referee.audit import Audit
    from rorqual.referee.policy import BudgetBody
    from rorqual.server.gateway import Gateway
    from rorqual.server.gateway_run import run_gateway
    from rorqual.server.gateway_threads import Threads
    from rorqual.server.gateway_wire import Upstream

    if upstream is None:
        raise ConfigError("--upstream is missing: the referee stands in front of an endpoint. Give its address.")
    if not upstream.startswith(("http://", "https://")):
        raise ConfigError(f"--upstream is {upstream!r}. Give an address such as http://127.0.0.1:8000.")
    if mode == "enforce" and stream == "annotate_after":
        raise ConfigError(
            "--stream annotate_after sends answers before they are checked, and --mode is enforce. Use buffer or "
            "holdback."
        )
    if journal is not None and no_journal:
        raise ConfigError("--journal names a folder and --no-journal says that there is none. Leave one of them out.")
    if not keep_reasoning and continuity is not None:
        raise ConfigError("--continuity says where reasoning is kept and --no-keep-reasoning that it is not. Choose.")
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
    budget = BudgetBody(max_rounds=max_rounds, token_ratio=token_ratio, wall_ms=wall_ms)
    checks, runner = checks_with(check, run_code), code_runner(run_code)
    options = Options(
        mode, load_policy(policy, profile), checks, budget=budget, stream=stream, runs_code=runner is not None
    )
    judges = judge_server(judge, judge_model)
    kept = None if no_journal else journal or data_folder() / "referee"
    dashboard = build_dashboard(evals, kept)
    audit = Audit(kept, texts=texts)
    sure = _confidence(confidence, confidence_model, upstream, options.policy.profile.name)
    decides = Referee(
        confidence=sure,
        retriever=retriever_of(sources),
        fallbacks=fallback or (),
        constrain=constrain,
        judge=None if judges is None else judges.judge,
        code=runner,
    )
    audit.learn(decides.rates)
    gateway = Gateway(
        Upstream(upstream, os.environ.get(KEY_VARIABLE) or None, upstream_timeout),
        options,
        decides,
        audit,
        Threads(
            _continuity(continuity, continuity_size, continuity_hours) if keep_reasoning else None, missing_reasoning
        ),
        operations,
        dashboard=dashboard,
    )

    def say_where(url: str) -> None:
        if as_json:
            about = {"url": url, "api": f"{url}/v1", "upstream": upstream, "mode": mode, "policy_id": options.policy.id}
            typer.echo(json.dumps(about))
        else:
            typer.echo(f"The referee ({mode}) is at {url}/v1 in front of {upstream}   (Ctrl-C stops it)")

    try:
        run_gateway(
            gateway,
            host=host,
            port=port,
            certificate=certificate(ssl_certfile, ssl_keyfile),
            drain_s=drain_s,
            log_style=log,
            on_ready=say_where,
        )
    finally:
        for one in (runner, judges):
            if one is not None:
                one.close()


def _continuity(where: str | None, size: str, hours: float) -> "Continuity":
    """Raises: ConfigError for a folder that cannot be used, MissingExtraError."""
    most = parse_bytes(size, "--continuity-size")
    if where == "memory":
        from rorqual.referee import Continuity

        return Continuity(most, hours * 3600)
    from rorqual.folders import data_folder
    from rorqual.referee.continuity_disk import DiskContinuity

    return DiskContinuity(data_folder() / "continuity" if where is None else Path(where), most, hours * 3600)


def _confidence(file: Path | None, model: str | None, upstream: str, profile: str) -> "CalibratedConfidence | None":
    """Raises: ConfigError for one without the other; DataError for a calibration of another model or endpoint."""
    if (file is None) != (model is None):
        raise ConfigError("--confidence FILE and --confidence-model NAME belong together. Give both, or neither.")
    if file is None or model is None:
        return None
    from rorqual.evals.calibrate import confidence_for

    return confidence_for(file, upstream, model, key=os.environ.get(KEY_VARIABLE) or None, profile=profile)


def _refuse_options(context: typer.Context) -> None:
    """Raises: ConfigError for options before the name of a command, which would have no effect."""
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if given:
        named = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(
            f"{named} before {context.invoked_subcommand} has no effect there. Give the options behind "
            f"`rorqual referee {context.invoked_subcommand}`."
        )


referee.command("trial")(trial)
referee.command("calibrate")(calibrate)
