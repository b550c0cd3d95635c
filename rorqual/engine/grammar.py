"""Constrained decoding: which tokens may come next, by a grammar over the reply.

A `Grammar` is text and belongs to a request's parameters. `Grammars` compiles it for one tokenizer, once, and hands out
a `Constraint` for each request that is held to it. The reasoning before a reply is free; the grammar begins behind
`</think>`. Scores of tokens that may not come are taken out before the sampler's own filters, so that a constrained
request draws from the model's distribution over what is allowed, with the same random numbers. Matching is done by
llguidance; left out: tokens that the grammar forces are still asked of the model.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.errors import MissingExtraError, RequestError

MOST_BYTES = 1 << 20
"""Of a grammar's text; llguidance has limits of its own for what it expands to."""

_MARKER = re.compile("⟦([^⟦⟧]+)⟧")


@dataclass(frozen=True)
class Grammar:
    """What a reply must be: Lark in llguidance's dialect, control tokens as `⟦NAME⟧`.

    after: name of the control token behind which the grammar begins, such as `</think>`; from the start without one.
    param: the field that asked for it, for refusals.
    """

    lark: str
    after: str | None = None
    param: str | None = None


class Grammars:
    """Compiled grammars for one tokenizer, the last `most` of them. Thread-safe."""

    def __init__(self, tokenizer: Any, num_choices: int, most: int = 64) -> None:  # Any: a TextTokenizer
        self._tokenizer, self._num_choices, self._most = tokenizer, num_choices, most
        self._words: Any = None  # llguidance's form of the tokenizer
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """A fresh constraint; the first for a grammar compiles it, which can take a good part of a second.

        Raises: RequestError for a grammar that cannot be matched, MissingExtraError without llguidance.
        """
        with self._lock:
            base = self._compiled.get(grammar)
            if base is not None:
                self._compiled.move_to_end(grammar)
        if base is None:
            base = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = base
                while len(self._compiled) > self._most:
                    self._compiled.popitem(last=False)
        begin = None if grammar.after is None else self._tokenizer.token_id(grammar.after)
        control = [token for token in self._tokenizer.control_token_ids if token != begin and token < self._num_choices]
        return Constraint(base.deep_copy(), self._num_choices, begin, torch.tensor(sorted(control)))

    def _compile(self, grammar: Grammar) -> Any:
        llguidance = _library()
        if len(grammar.lark) > MOST_BYTES:
            raise _cannot(grammar, f"it is {len(grammar.lark)} characters long, over {MOST_BYTES}")
        with self._lock:
            if self._words is None:
                self._words = llguidance.LLTokenizer(_Words(self._tokenizer), n_vocab=self._num_choices)
        lark = _MARKER.sub(lambda match: f"<[{self._tokenizer.token_id(match[1])}]>", grammar.lark)
        matcher = llguidance.LLMatcher(self._words, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)
        if matcher.is_error():
            raise _cannot(grammar, matcher.get_error().strip().partition("\n<state>")[0][:500])
        return matcher


class Constraint:
    """What one request may still say; told of every token as it is chosen.

    begin: the token behind which the grammar begins, None for the start. control: all other control tokens [N].
    """

    def __init__(self, matcher: Any, num_choices: int, begin: int | None, control: Tensor) -> None:
        self._matcher, self._begin, self._control = matcher, begin, control
        self._bits = np.zeros(-(-num_choices // 32), dtype=np.int32)
        self._num_choices = num_choices

    def apply(self, logits_V: Tensor) -> Tensor:
        """A copy of the scores [V] with minus infinity for what may not come next.

        Raises: RequestError when the grammar cannot go on.
        """
        logits_V = logits_V.float().clone()
        if self._begin is not None:  # still reasoning: any text, and then the reply
            return logits_V.index_fill_(0, self._control.to(logits_V.device), float("-inf"))
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise _failed(self._matcher.get_error())
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._num_choices)
        return logits_V.masked_fill_(torch.from_numpy(allowed) == 0, float("-inf"))

    def advance(self, token: int) -> None:
        """`token` has been chosen. Raises: RequestError when the grammar does not know it."""
        if self._begin is not None:
            if token == self._begin:
                self._begin = None
            return
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise _failed(self._matcher.get_error())


class _Words:
    """A tokenizer as llguidance wants it: every control token is special, so no text can hold one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = None
        self.special_token_ids: Sequence[int] = sorted(tokenizer.control_token_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        ids: list[int] = self._tokenizer.encode(text, allow_special=False)
        return ids


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            "llguidance is not installed, and answers are held to schemas with it. Install it with: "
            'pip install "rorqual[serve]"'
        ) from error
    return llguidance


def _cannot(grammar: Grammar, why: str) -> RequestError:
    return RequestError(
        f"The answer cannot be held to what {grammar.param or 'the grammar'} asks for: {why}. Send a simpler schema.",
        param=grammar.param,
    )


def _failed(why: str) -> RequestError:
    return RequestError(
        f"The answer could not be held to its grammar any further ({why.strip()[:300]}). Send a simpler schema.",
        status=500,
        type="server_error",
    )
