"""A checkpoint in this process, asked through an `Engine`.

A forced answer is made by going back: when the text abstains, the token that began the abstention is ruled out at its
place and the model continues from there with its next best one. So exactly the abstaining sequences are masked, and
every other token stays allowed everywhere.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rorqual import __version__
from rorqual.chat import render_messages, suppressed_ids
from rorqual.chat.markers import THINK_END
from rorqual.engine import CacheSettings, Engine, EngineSettings, SamplingParams
from rorqual.engine.exactness import examine
from rorqual.errors import ConfigError, RequestError
from rorqual.evals.records import EngineOf, Sampling, Usage
from rorqual.evals.selection import needle_hits, span_of
from rorqual.evals.targets.base import Abstains, Answer, Identity, Prompt, TransportError, sha, token_signals
from rorqual.model import Transformer

if TYPE_CHECKING:
    from rorqual.engine import TokenEvent
    from rorqual.tokenizer import Tokenizer

MOST_RETURNS = 12
"""Times a forced answer goes back before it is taken as it is."""


class LoadedTarget:
    """A model loaded from a checkpoint. name: what the user called it. guard: of retrieval, where the engine has one.

    Raises: ConfigError for a guard that this engine does not know; what `rorqual.load` raises.
    """

    can_force = True

    def __init__(
        self, name: str, *, parallel: int = 8, guard: bool | None = None, context_limit: int | None = None, **load: Any
    ) -> None:
        from rorqual.checkpoint import load as load_checkpoint
        from rorqual.engine.store.fingerprint import store_fingerprint

        options = guard_options(guard)
        model, tokenizer = load_checkpoint(name, **load)
        self._stack = contextlib.ExitStack()
        settings = EngineSettings(
            max_running=parallel, max_queued=4 * parallel, cache=CacheSettings(), context_limit=context_limit, **options
        )
        self.engine: Engine = self._stack.enter_context(settings.open(model, tokenizer))
        self.tokenizer: Tokenizer = tokenizer
        self.parallel = parallel
        flags = {
            "determinism": "D2" if examine(model).why is None else "D0",
            "max_running": parallel,
            "guard": guard,
            "dtype": str(model.cfg.torch_dtype),
        }
        self.identity = Identity(
            name,
            store_fingerprint(model).hex(),
            tokenizer.fingerprint,
            EngineOf(name="rorqual", version=__version__, flags=flags),
        )

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def answer(self, prompt: Prompt, sampling: Sampling) -> Answer:
        return self._ask(prompt, sampling, None)

    def force(self, prompt: Prompt, sampling: Sampling, abstains: Abstains) -> Answer:
        return self._ask(prompt, sampling, abstains)

    def _ask(self, prompt: Prompt, sampling: Sampling, abstains: Abstains | None) -> Answer:
        ids = self.prompt_ids(prompt)
        suppressed = suppressed_ids(self.tokenizer, thinking=prompt.mode == "thinking", tools=bool(prompt.tools))
        params = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed, logprobs=True,
            suppress_token_ids=suppressed, max_tokens=sampling.max_tokens,
        )  # fmt: skip
        written = _Written(self.engine, ids, params, sampling.max_tokens)
        try:
            written.go_on()
            for _ in range(MOST_RETURNS if abstains is not None else 0):
                assert abstains is not None
                if (begin := abstains(written.text)) is None:
                    break
                written.go_back(begin)
        except RequestError as error:
            raise TransportError(f"{type(error).__name__}: {error}") from None
        return written.answered(self.tokenizer, prompt)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids the model reads for `prompt`."""
        if prompt.text is not None:
            from rorqual.chat.markers import BOS

            return self.tokenizer.encode(BOS + prompt.text)
        rendered = render_messages(prompt.messages, prompt.tools, prompt.mode, prompt.effort)
        return self.tokenizer.encode_guarded(rendered.pieces())

    def needle_signals(self, prompt: Prompt, answer: str, value: str, offset: int) -> dict[str, float]:
        if not isinstance(self.engine.model, Transformer):
            return {}
        text = render_messages(prompt.messages, prompt.tools, prompt.mode, prompt.effort).text
        content = str(prompt.messages[-1]["content"])
        begin = text.index(value, text.rindex(content) + offset)
        ids, reply = self.prompt_ids(prompt), self.tokenizer.encode(answer)
        needle = self._tokens_of(ids, text, begin, value)
        queries = self._tokens_of(reply, answer, answer.index(value), value)
        guards = getattr(self.engine, "guards", None)
        guard = None if guards is None else guards.of(None, ())
        return dict(self.engine.aside(needle_hits(self.engine.model, ids, reply, needle, queries, guard)).result())

    def _tokens_of(self, ids: list[int], text: str, begin: int, value: str) -> range:
        """Tokens of `ids`, which are `text`, that hold `value` at character `begin`."""
        first = len(text[:begin].encode())
        return span_of([self.tokenizer.token_bytes(i) for i in ids], first, first + len(value.encode()))

    def close(self) -> None:
        self._stack.close()


class _Written:
    """A completion that grows, can be cut back to a place, and goes on with the token there ruled out."""

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams, max_tokens: int) -> None:
        self._engine, self._ids, self._params, self._max_tokens = engine, ids, params, max_tokens
        self._events: list[TokenEvent] = []
        self._banned: defaultdict[int, set[int]] = defaultdict(set)
        self._began = time.perf_counter()
        self._first_ms: float | None = None
        self._cached = 0
        self._bytes_factor = 1.0
        self._sampled = 0
        self._finish = "stop"

    @property
    def text(self) -> str:
        return "".join(event.text for event in self._events)

    def go_on(self) -> None:
        """Continue to the end, one token apart where something is ruled out. Raises: RequestError."""
        while (banned := self._banned.get(len(self._events))) is not None:
            self._run(
                self._params.replace(max_tokens=1, suppress_token_ids=(*self._params.suppress_token_ids, *banned))
            )
            if self._finish == "stop" or len(self._events) >= self._max_tokens:
                return
        self._run(self._params.replace(max_tokens=self._max_tokens - len(self._events)))

    def go_back(self, begin: int) -> None:
        """Rule out the token that holds character `begin` of the text, and write on from there."""
        length = 0
        for index, event in enumerate(self._events):
            length += len(event.text)
            if length > begin:
                assert event.id is not None
                self._banned[index].add(event.id)
                for later in [place for place in self._banned if place > index]:
                    del self._banned[later]
                del self._events[index:]
                return self.go_on()
        raise AssertionError(f"no token of {self.text!r} holds character {begin}")

    def _run(self, params: SamplingParams) -> None:
        so_far = [event.id for event in self._events if event.id is not None]
        request = self._engine.submit([*self._ids, *so_far], params, wait=True)
        done = request.result()
        if self._first_ms is None:
            self._first_ms = 1000 * (done.timing.queue_s + done.timing.first_token_s)
            self._cached = done.usage.cached_tokens
        self._sampled += done.usage.completion_tokens
        if (guard := getattr(request, "guard", None)) is not None:
            self._bytes_factor = float(guard.bytes_factor)
        self._events += [event for event in request.events if event.id is not None]
        self._finish = done.finish_reason

    def answered(self, tokenizer: Tokenizer, prompt: Prompt) -> Answer:
        reasoning = self._reasoning_length(tokenizer) if prompt.mode == "thinking" else 0
        said = [e.logprob for e in self._events[reasoning:] if e.logprob is not None and e.id != tokenizer.eos_token_id]
        signals = token_signals(said)
        usage = Usage(
            prompt=len(self._ids),
            completion=self._sampled,
            reasoning=min(reasoning, self._sampled),
            cached=self._cached,
        )
        confidence = math.exp(signals["min_logprob"]) if signals else None
        signals["bytes_factor"] = self._bytes_factor
        return Answer(
            self.text, self._finish, usage, self._first_ms, 1000 * (time.perf_counter() - self._began),
            sha(repr(self._ids).encode()), confidence, signals,
        )  # fmt: skip

    def _reasoning_length(self, tokenizer: Tokenizer) -> int:
        """Tokens up to `</think>`, it included; all of them when it never came."""
        end = tokenizer.token_id(THINK_END)
        return next((i + 1 for i, event in enumerate(self._events) if event.id == end), len(self._events))


def guard_options(guard: bool | None) -> dict[str, Any]:
    """What to give `EngineSettings` for `--guard on|off`; None leaves the engine's own choice.

    Raises: ConfigError when this engine has no guard.
    """
    if guard is None:
        return {}
    if "guard" not in {f.name for f in fields(EngineSettings)}:
        raise ConfigError(
            f"--guard {'on' if guard else 'off'} was asked for, but the engine of this installation has no retrieval "
            "guard to switch. Leave --guard out."
        )
    return {"guard": "default" if guard else "off"}
