"""`rorqual chat`: a conversation in the terminal, streamed, with reasoning shown dim."""

import io
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from rorqual.chat import ContentDelta, Event, Finished, ReasoningDelta
from rorqual.cli.options import (
    OUTPUT,
    CacheFormat,
    Effort,
    EffortOption,
    Json,
    MaxTokens,
    Memory,
    MinP,
    ModelArgument,
    Seed,
    Speculate,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    Weights,
)
from rorqual.cli.terminal import printable
from rorqual.errors import RequestError

if TYPE_CHECKING:
    from rorqual.cli.talk import Conversation

EFFORTS = get_args(Effort)
HELP = f"/exit leaves, /new starts again, /effort {'|'.join(EFFORTS)} sets the reasoning, /help shows this"


def chat(
    model: ModelArgument = "minke",
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Ask this one question and leave.", rich_help_panel=OUTPUT),
    ] = None,
    system: System = None,
    effort: EffortOption = None,
    speculate: Speculate = False,
    threads: Threads = None,
    weights: Weights = None,
    memory: Memory = None,
    cache_format: CacheFormat = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.6,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Chat with a model in the terminal. In the chat, /help lists what you can type.

    \b
    rorqual chat
    rorqual chat minke --effort none -m "What is 8 + 5?"
    """
    from rorqual.cli.talk import Conversation, open_engine
    from rorqual.engine import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    with open_engine(model, threads, weights, cache_format, speculate, memory) as (engine, tokenizer):
        conversation = Conversation(engine, tokenizer, params, effort, system)
        if message is not None:
            reply(conversation, message, as_json=as_json)
            return
        if not as_json and sys.stdin.isatty():
            typer.secho(f"{model}. {HELP}", dim=True)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # one bad byte must not end the chat
        refused = 0
        while (line := read_line(as_json)) is not None:
            outcome = follow(conversation, line, as_json=as_json)
            refused += outcome == "refused"
            if outcome == "over":
                break
        if refused and not sys.stdin.isatty():
            raise typer.Exit(2)  # a script must learn that not every line was answered


def read_line(as_json: bool) -> str | None:
    """The next line typed or piped in; None at the end."""
    try:
        return input("" if as_json or not sys.stdin.isatty() else "\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def follow(conversation: "Conversation", line: str, *, as_json: bool) -> Literal["done", "refused", "over"]:
    """Do what a line says: a command or a question. Only the known words are commands, so `/etc is what?` is asked."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit", "/bye"):
        return "over"
    if command == "/new":
        conversation.clear()
    elif command == "/effort" and rest in EFFORTS:
        conversation.effort = rest
    elif command in ("/effort", "/help"):
        typer.secho(HELP, dim=True, err=as_json)
    elif line:
        try:
            reply(conversation, line, as_json=as_json)
        except RequestError as error:  # the conversation goes on; /new helps when it has become too long
            if as_json:
                typer.echo(json.dumps({"error": {"message": error.message, "param": error.param, "code": error.code}}))
            else:
                typer.secho(f"RequestError: {error}", fg="red", err=True)
            return "refused"
        except KeyboardInterrupt:
            typer.secho(" (stopped; the question is taken back)", dim=True)
    return "done"


def reply(conversation: "Conversation", question: str, *, as_json: bool) -> None:
    """Ask, and print the reply while it comes; with `as_json` one object at the end."""
    finish(conversation, show(conversation.ask(question), as_json=as_json), as_json=as_json)


def show(events: Iterable[Event], *, as_json: bool) -> Finished:
    """Print a reply's events, reasoning dim; with `as_json` nothing. Returns the last one."""
    was_reasoning = False
    finished: Finished | None = None
    for event in events:
        if isinstance(event, Finished):
            finished = event
        elif as_json:
            continue
        elif isinstance(event, ReasoningDelta):
            was_reasoning = True
            typer.secho(printable(event.text), nl=False, dim=True)
        else:
            if was_reasoning:
                was_reasoning = False
                typer.echo("\n")
            if isinstance(event, ContentDelta):
                typer.echo(printable(event.text), nl=False)
    assert finished is not None, "a reply that does not raise ends with this event"
    return finished


def finish(conversation: "Conversation", event: Finished, *, as_json: bool) -> None:
    """Print what belongs under a reply."""
    usage, timing = conversation.usage, conversation.timing
    assert usage is not None and timing is not None
    rate = (usage.completion_tokens - 1) / timing.decode_s if timing.decode_s else 0.0
    if as_json:
        report = {
            "message": event.message,
            "finish_reason": event.finish_reason,
            "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
            "tokens_per_s": round(rate, 1),
        }
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    typer.echo()
    if sys.stdout.isatty():
        cut = ", cut at --max-tokens" if event.finish_reason == "length" else ""
        typer.secho(f"{usage.completion_tokens} tokens, {rate:.0f} tokens/s{cut}", dim=True)
