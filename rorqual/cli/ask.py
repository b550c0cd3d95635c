"""`rorqual ask`: a question about a long text in a file, with progress while it is read and what it cost at the end."""

import codecs
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rorqual.cli.options import (
    MODEL,
    OUTPUT,
    CacheFormat,
    EffortOption,
    IndexSearch,
    Json,
    MaxTokens,
    Memory,
    MinP,
    ModelOption,
    Seed,
    Speculate,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    Weights,
    use_threads,
)
from rorqual.cli.reading import ReadingBar
from rorqual.errors import RequestError

if TYPE_CHECKING:
    from rorqual.cli.talk import Reply
    from rorqual.engine import Engine

CHUNK = 2048
"""Tokens of a step: nobody else waits, so more than a server takes."""

DOCUMENT = "[file name]: {name}\n[file content begin]\n{text}\n[file content end]\n{question}"
"""How DeepSeek's model cards put a file into a prompt. The file comes first, so that other questions share it."""


def ask(
    question: Annotated[str, typer.Argument(help="What to ask about the file.", show_default=False)],
    file: Annotated[
        str, typer.Option("--file", "-f", help="Text file to read, UTF-8; - is stdin.", rich_help_panel=MODEL)
    ],
    model: ModelOption = "minke",
    effort: EffortOption = None,
    system: System = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            help="Folder that keeps what was read: the next question about the same file begins at once.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"],
        typer.Option(
            "--dtype", help="Precision of the computation; fp32 takes about twice as long.", rich_help_panel=MODEL
        ),
    ] = "bf16",
    speculate: Speculate = False,
    threads: Threads = None,
    weights: Weights = None,
    memory: Memory = None,
    cache_format: CacheFormat = None,
    index_search: IndexSearch = "exact",
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.6,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    seed: Seed = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Neither progress nor cost on stderr.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a question about a text as long as the model can read: up to a million tokens.

    \b
    rorqual ask --file book.txt "Who is the narrator?"
    rorqual ask --file book.txt --cache ~/.cache/books "And where does it end?"
    git log -p | rorqual ask --file - "What changed in the parser?"
    """
    name, text = read_text(file)

    import torch

    from rorqual.checkpoint import load
    from rorqual.cli.chat import show
    from rorqual.cli.talk import Reply, render
    from rorqual.engine import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    use_threads(threads)
    network, tokenizer = load(
        model, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, weights=weights, memory=memory,
        cache=cache_format,
    )  # fmt: skip
    opening = [{"role": "system", "content": system}] if system else []
    content = DOCUMENT.format(name=name, text=text, question=question)
    prompt = render(tokenizer, [*opening, {"role": "user", "content": content}], effort)
    check_length(file, len(prompt.ids), max_tokens, model, network.cfg.max_position_embeddings)
    del text, content
    with reader(network, tokenizer, cache, speculate, index_search) as engine:
        bar = ReadingBar(sys.stderr, is_shown=not quiet and sys.stderr.isatty())
        began = time.perf_counter()
        reply = Reply(engine, tokenizer, prompt, params, on_progress=bar)
        finished = show(bar.ended_by(reply), as_json=as_json)
        cost = cost_of(reply, time.perf_counter() - began)
    if as_json:
        typer.echo(json.dumps({"message": finished.message, "finish_reason": finished.finish_reason} | cost))
    else:
        typer.echo()
    if not quiet:
        typer.echo(sentence(cost), err=True)


def read_text(file: str) -> tuple[str, str]:
    """The name the model is told, and the text. Raises: RequestError for what is no readable UTF-8 text."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise RequestError(
            f"--file {file} cannot be read ({error.strerror or error}), so there is nothing to ask about. Check the "
            "path, or give - to read stdin.",
            param="file",
        ) from None
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_text(file, f"byte {error.start:,} is no UTF-8") from None
    if "\0" in text:
        raise _no_text(file, f"there is a zero byte at {text.index(chr(0)):,}")
    if not text.strip():
        raise RequestError(
            f"--file {file} is empty, so there is nothing to ask about. Give a file with text.", param="file"
        )
    return ("stdin" if file == "-" else Path(file).name), text


def _no_text(file: str, why: str) -> RequestError:
    return RequestError(
        f"--file {file} is not text ({why}), and the model reads nothing else. Convert it to UTF-8 text first, "
        "for instance with pdftotext or iconv.",
        param="file",
    )


def check_length(file: str, num_tokens: int, max_tokens: int, model: str, limit: int) -> None:
    """Raises: RequestError when prompt and answer are longer than the model can read."""
    if num_tokens + max_tokens <= limit:
        return
    raise RequestError(
        f"--file {file} and the question are {num_tokens:,} tokens, and the answer may be {max_tokens:,} more, but "
        f"{model} reads at most {limit:,} (max_position_embeddings of its config). "
        + ("Lower --max-tokens." if num_tokens < limit else "Split the file, or choose a model with a longer context."),
        param="file",
        code="context_length_exceeded",
    )


@contextlib.contextmanager
def reader(
    network: Any, tokenizer: Any, cache: str | None, speculate: bool = False, index_search: str = "exact"
) -> Iterator["Engine"]:
    """An engine for one long prompt; with a cache folder it starts from what was read before and keeps what it reads.

    Raises: ConfigError when the folder cannot be used.
    """
    from rorqual.engine import CacheSettings, EngineSettings

    store = None if cache is None else CacheSettings(folder=Path(cache).expanduser())
    settings = EngineSettings(max_running=1, chunk=CHUNK, cache=store, speculate=speculate, index_search=index_search)
    try:
        with settings.open(network, tokenizer) as engine:
            yield engine
    except KeyboardInterrupt:
        if store is not None:
            typer.echo(f"stopped; what was read is kept in {cache}, and the same command goes on from there", err=True)
        raise


def cost_of(reply: "Reply", seconds: float) -> dict[str, Any]:
    """What the answer took."""
    usage, timing = reply.request.usage, reply.request.timing
    computed = usage.prompt_tokens - usage.cached_tokens
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "reading_s": round(timing.first_token_s, 3),
        "reading_tokens_per_s": round(computed / timing.first_token_s, 1) if timing.first_token_s else None,
        "answering_s": round(timing.decode_s, 3),
        "seconds": round(seconds, 3),
        "peak_bytes": peak_bytes(),
    }


def sentence(cost: dict[str, Any]) -> str:
    """The same for people."""
    usage = cost["usage"]
    cached = f" ({usage['cached_tokens']:,} from the cache)" if usage["cached_tokens"] else ""
    peak = "" if cost["peak_bytes"] is None else f"; peak memory {cost['peak_bytes'] / (1 << 20):,.0f} MiB"
    return (
        f"read {usage['prompt_tokens']:,} tokens{cached} in {cost['reading_s']:,.1f} s, wrote "
        f"{usage['completion_tokens']:,} in {cost['answering_s']:,.1f} s{peak}"
    )


def peak_bytes() -> int | None:
    """Most memory that this process has held; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
