"""Checks of single sequences: every residue of the prompt's length modulo 4 and 128 (the two kinds of blocks).

A row of random tokens is run once as a whole, and its logits are the truth. Then its first n tokens are a prompt, for
128 consecutive n, and what follows is computed in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.selftest.report import Check
from rorqual.model import Segment, State, Transformer
from rorqual.model.pages import PagePool

BLOCK = 128
NEXT = 3
"""Tokens that follow each prompt."""

CHUNKS = (1, 2, 3, 4, 5, 7, 31, 64, 127, 128, 129, 200)


@dataclass
class Row:
    """A row of tokens [S], its logits [S, V] in one pass, and the lengths of prompts to try."""

    model: Transformer
    tokens: Tensor
    logits: Tensor
    lengths: Sequence[int]
    seed: int

    def after(self, prompt: int) -> Tensor:
        """Logits after the tokens that follow a prompt."""
        return self.logits[prompt : prompt + NEXT]

    def following(self, prompt: int) -> Tensor:
        """The tokens that follow a prompt."""
        return self.tokens[prompt : prompt + NEXT]

    def tolist(self, count: int | None = None) -> list[int]:
        """The first `count` tokens, or all."""
        ids: list[int] = self.tokens[:count].tolist()
        return ids

    def noise(self, count: int, number: int) -> Tensor:
        """Random tokens [count]."""
        draw = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randint(0, self.model.cfg.vocab_size, (count,), generator=draw)


def new_row(model: Transformer, seed: int, first: int, step: int) -> Row:
    """Prompts of `first` tokens, and of more in steps, up to 127 more."""
    row = Row(model, torch.zeros(0), torch.zeros(0), range(first, first + BLOCK, step), seed)
    row.tokens = row.noise(first + BLOCK + NEXT, 0)
    row.logits = feed(model, row.tokens, None)
    return row


@torch.inference_mode()
def feed(model: Transformer, tokens: Tensor, state: State | None) -> Tensor:
    """Logits [n, V] of tokens [n]."""
    return model(tokens[None], state=state)[0]


@torch.inference_mode()
def one_by_one(model: Transformer, tokens: Tensor, state: State) -> Tensor:
    """The same, token by token."""
    return torch.cat([model(token[None], state=state)[0] for token in tokens.split(1)])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and the C operations use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chunks(row: Row, check: Check) -> None:
    for size in CHUNKS:
        state = row.model.new_state()
        found = torch.cat([feed(row.model, part, state) for part in row.tokens.split(size)])
        check.same(found, row.logits, f"chunks of {size}")


def prompts(row: Row, check: Check) -> None:
    for n in row.lengths:
        state = row.model.new_state()
        found = feed(row.model, row.tokens[:n], state)
        check.same(found[-1], row.logits[n - 1], f"prompt of {n} tokens")
        check.same(one_by_one(row.model, row.following(n), state), row.after(n), f"decoding after {n} tokens")


def two_threads(row: Row, check: Check) -> None:
    with threads(2 if torch.get_num_threads() == 1 else 1):
        prompts(row, check)


def walk(row: Row, pool: PagePool | None, check: Check) -> Iterator[tuple[int, State]]:
    """The row token by token; the state wherever a prompt ends."""
    state, done = row.model.new_state(pool=pool), 0
    for n in row.lengths:
        found = one_by_one(row.model, row.tokens[done:n], state)
        check.same(found, row.logits[done:n], f"decoding tokens {done} to {n - 1}")
        done = n
        yield n, state


def forks(row: Row, check: Check) -> None:
    for n, state in walk(row, None, check):
        copy = state.fork()
        feed(row.model, row.noise(2, n), copy)  # what one does, the other must not see
        check.same(feed(row.model, row.following(n), state.fork()), row.after(n), f"a fork at {n} tokens")


def truncation(row: Row, check: Check) -> None:
    for n, state in walk(row, None, check):
        copy = state.fork()
        for count in (1, 5):
            feed(row.model, row.noise(count, n), copy)
            copy.truncate(n)
        found = one_by_one(row.model, row.following(n), copy)
        check.same(found, row.after(n), f"drafts taken back at {n} tokens")


def snapshots(row: Row, check: Check) -> None:
    for n, state in walk(row, None, check):
        copy = row.model.restore(state.snapshot())
        check.same(feed(row.model, row.following(n), copy), row.after(n), f"a snapshot at {n} tokens")


def pages(row: Row, check: Check) -> None:
    pool = PagePool(row.model.cfg, row.model.reference, 8 * len(row.tokens))
    for n, state in walk(row, pool, check):
        copy = state.fork()
        feed(row.model, row.noise(5, n), copy)
        copy.truncate(n)
        check.same(one_by_one(row.model, row.following(n), copy), row.after(n), f"pages at {n} tokens")


def neighbours(row: Row, check: Check) -> None:
    """Steps with three other sequences, at random places, that read 1 to 9 tokens beside it."""
    model = row.model
    others = [model.new_state() for _ in range(3)]
    for n, state in walk(row, None, check):
        copy = state.fork()
        for count in (1, 2):
            done = copy.lengths[0]
            parts = [row.noise(1 + (n * 7 + i * 3 + count) % 9, 10 * n + i) for i in range(3)]
            segments = [Segment(other, part) for other, part in zip(others, parts, strict=True)]
            place = n % 4
            segments.insert(place, Segment(copy, row.tokens[done : done + count]))
            with torch.inference_mode():
                logits = model.next_scores(segments, range(sum(len(segment.tokens) for segment in segments))).logits[0]
            begin = sum(len(segment.tokens) for segment in segments[:place])
            found = logits[begin : begin + count]
            check.same(found, row.logits[done : done + count], f"neighbours at {done} tokens")


CHECKS: dict[str, tuple[str, Callable[[Row, Check], None]]] = {
    "chunks": ("the prompt in chunks of 1 to 200 tokens", chunks),
    "prompts": ("prompts of every length modulo 128, then token by token", prompts),
    "threads": ("the same on another number of threads", two_threads),
    "neighbours": ("in steps with three other sequences", neighbours),
    "fork": ("from a fork of the state", forks),
    "truncate": ("after drafts that were taken back", truncation),
    "snapshot": ("from a snapshot that was saved and restored", snapshots),
    "pages": ("with entries in shared pages", pages),
}
