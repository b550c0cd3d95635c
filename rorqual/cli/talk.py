"""A conversation in the terminal: keeps the messages, asks the engine, parses the reply while it streams.

Left out: tools. The model is shown none and cannot write a call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rorqual.chat import Event, Finished, StreamParser, render_messages, resolve_effort, suppressed_ids
from rorqual.cli.options import use_threads
from rorqual.engine import Engine, SamplingParams, Timing, Usage
from rorqual.tokenizer import Tokenizer


@contextmanager
def open_engine(model: str, threads: int | None, speculate: bool | None = None) -> Iterator[tuple[Engine, Tokenizer]]:
    """The named model, loaded and ready; closed on leaving. Raises: CheckpointError as `rorqual.load`."""
    from rorqual.checkpoint import load

    use_threads(threads)
    network, tokenizer = load(model)
    with Engine(network, tokenizer, speculate=speculate) as engine:
        yield engine, tokenizer


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
        mode, effort = resolve_effort(self.effort)
        prompt = render_messages([*opening, *self.messages, asked], thinking_mode=mode, reasoning_effort=effort)
        params = self.params.replace(suppress_token_ids=suppressed_ids(self.tokenizer, thinking=mode == "thinking"))
        request = self.engine.submit(self.tokenizer.encode_guarded(prompt.pieces()), params)
        parser = StreamParser(thinking_mode=mode)
        reason = None
        try:
            for token in request:
                yield from parser.feed(token.text)
                reason = token.finish_reason
        finally:
            request.cancel()
        self.usage, self.timing = request.usage, request.timing
        for event in parser.finish(reason):
            if isinstance(event, Finished):
                self.messages += [asked, event.message]
            yield event
