"""Models that weigh nothing, behind the interface the engine uses, and a tokenizer of bytes and markers.

`streams` are simply the logits here, so `final_hidden` and `logits` hand them on.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer, train_tokenizer


@cache
def byte_tokenizer() -> Tokenizer:
    """256 bytes and V4's markers: one token a byte, no merges."""
    return train_tokenizer(["x"], 275)


class MockModel:
    """Logits of position i are `logits_after(ids[: i + 1])`; a state is the list of ids it has seen."""

    def __init__(self, context: int = 4096) -> None:
        self.cfg = SimpleNamespace(vocab_size=byte_tokenizer().vocab_size, max_position_embeddings=context)
        self.chunks: list[tuple[int, int]] = []  # (state's number, tokens read), in the order of the steps
        self.step_s = 0.0
        self.gate = threading.Event()  # cleared: every step waits
        self.gate.set()
        self._num_states = 0

    def parameters(self) -> Iterator[Tensor]:
        return iter(())

    def new_state(self, batch_size: int = 1) -> Any:
        assert batch_size == 1
        self._num_states += 1
        return SimpleNamespace(ids=[], number=self._num_states - 1)

    def forward_streams(self, tokens: Tensor, *, state: Any) -> Tensor:
        assert self.gate.wait(30)
        time.sleep(self.step_s)
        self.chunks.append((state.number, tokens.shape[1]))
        rows = []
        for token in tokens[0].tolist():
            state.ids.append(token)
            rows.append(self.logits_after(state.ids))
        return torch.stack(rows)[None]

    def final_hidden(self, streams: Tensor) -> Tensor:
        return streams

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits_after(self, ids: list[int]) -> Tensor:
        raise NotImplementedError


class HashModel(MockModel):
    """Random logits that depend on every token so far; never ends by itself unless `may_end`."""

    def __init__(self, context: int = 4096, may_end: bool = False) -> None:
        super().__init__(context)
        self._may_end = may_end

    def logits_after(self, ids: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(derive(0, len(ids), sum(i * i for i in ids), *ids[-4:]))
        logits = torch.randn(self.cfg.vocab_size, generator=generator)
        if not self._may_end:
            logits[byte_tokenizer().eos_token_id] = -100.0
        return logits


class ScriptModel(MockModel):
    """Answers each prompt with the text a function returns, then EOS.

    The prompt ends two tokens after the last `<｜Assistant｜>`, at `<｜fim▁end｜>`, or else at once.
    """

    def __init__(self, reply: Callable[[str], str], context: int = 16384) -> None:
        super().__init__(context)
        self._reply = reply
        self._holds: dict[str, threading.Event] = {}
        self._prompt: tuple[int, ...] = ()
        self._answer: list[int] = []

    def hold(self, text: str) -> threading.Event:
        """Answers go no further than such a beginning until this is set."""
        self._holds[text] = threading.Event()
        return self._holds[text]

    def logits_after(self, ids: list[int]) -> Tensor:
        tokenizer = byte_tokenizer()
        end = 1
        for marker, extra in (("<｜Assistant｜>", 2), ("<｜fim▁end｜>", 1)):
            if (token := tokenizer.token_id(marker)) in ids:
                end = len(ids) - ids[::-1].index(token) - 1 + extra
        logits = torch.zeros(self.cfg.vocab_size)
        place = len(ids) - end
        if place < 0:  # within a prompt
            return logits
        prompt = tuple(ids[:end])
        if prompt != self._prompt:
            answer = self._reply(tokenizer.decode(prompt))
            self._prompt, self._answer = prompt, [*tokenizer.encode(answer), tokenizer.eos_token_id]
        if held := self._holds.get(tokenizer.decode(ids[end:])) if self._holds else None:
            assert held.wait(30)
        if place < len(self._answer):
            logits[self._answer[place]] = 50.0
        return logits
