"""A conversation in the terminal: keeps the messages, asks the engine, parses the reply while it streams.

Left out: tools. The model is shown none and cannot write a call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rorqual.chat import Event, Finished, StreamParser, render_messages, resolve_effort, suppressed_ids
from rorqual.cli.options import use_threads
from rorqual.engine import CacheSettings, Engine, EngineSettings, SamplingParams, Timing, Usage
from rorqual.engine.request import Progress
from rorqual.tokenizer import Tokenizer


@contextmanager
def open_engine(
    model: str,
    threads: int | None,
    weights: str | None = None,
    cache_format: str | None = None,
    speculate: bool = False,
    memory: str | None = None,
) -> Iterator[tuple[Engine, Tokenizer]]:
    """The named model, loaded and ready; closed on leaving. Raises: CheckpointError as `rorqual.load`."""
    from rorqual.checkpoint import load

    use_threads(threads)
    network, tokenizer = load(model, weights=weights, memory=memory, cache=cache_format)
    settings = EngineSettings(max_running=1, cache=CacheSettings(), speculate=speculate)
    with settings.open(network, tokenizer) as engine:
        yield engine, tokenizer


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation that waits for a reply."""

    ids: list[int]
    mode: str


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]], effort: str | None) -> Prompt:
    """Messages by the model's template. Raises: RequestError for messages that cannot be."""
    mode, effort = resolve_effort(effort)
    text = render_messages(messages, thinking_mode=mode, reasoning_effort=effort)
    return Prompt(tokenizer.encode_guarded(text.pieces()), mode)


class Reply:
    """A submitted prompt; iterate once for the reply's events. When left early the request is cancelled.

    Raises: RequestError as `Engine.submit`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Prompt,
        params: SamplingParams,
        on_progress: Progress | None = None,
    ) -> None:
        self._mode = prompt.mode
        params = params.replace(suppress_token_ids=suppressed_ids(tokenizer, thinking=prompt.mode == "thinking"))
        self.request = engine.submit(prompt.ids, params, on_progress=on_progress, rendered=True)

    def __iter__(self) -> Iterator[Event]:
        parser = StreamParser(thinking_mode=self._mode)
        reason = None
        try:
            for token in self.request:
                yield from parser.feed(token.text)
                reason = token.finish_reason
        finally:
            self.request.cancel()
        yield from parser.finish(reason)


@dataclass
class Conversation:
    """Messages so far, and how to ask for the next."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    effort: str | None = None
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    usage: Usage | None = None
    timing: Timing | None = None

    def clear(self) -> None:
        """Forget everything said; the system message stays."""
        self.messages.clear()

    def ask(self, question: str) -> Iterator[Event]:
        """Put a question and yield the reply's events; when left early the question is taken back.

        Raises: RequestError when the conversation no longer fits the model's context, among others.
        """
        asked = {"role": "user", "content": question}
        opening = [{"role": "system", "content": self.system}] if self.system else []
        prompt = render(self.tokenizer, [*opening, *self.messages, asked], self.effort)
        reply = Reply(self.engine, self.tokenizer, prompt, self.params)
        for event in reply:
            if isinstance(event, Finished):
                self.usage, self.timing = reply.request.usage, reply.request.timing
                self.messages += [asked, event.message]
            yield event
