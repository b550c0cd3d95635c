"""Sources of training documents: each gives the documents of any index, from (seed, index) alone.

Nothing else is remembered between calls, which is what makes exact resume a matter of a few integers.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rorqual.data import tasks
from rorqual.data.document import Document, encode_pieces
from rorqual.data.fim import fim_document, split_for_fim
from rorqual.data.shards import TokenShard
from rorqual.data.tasks import TaskFamily
from rorqual.errors import ConfigError
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer


class Source(Protocol):
    """Endless supply of documents with random access.

    `name` is unique in a mixture; `fingerprint` changes when the documents would; `has_splittable`: some
    of its documents may be cut by a row's end, so it can fill any gap.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def has_splittable(self) -> bool: ...
    def documents(self, seed: int, index: int) -> list[Document]:
        """The documents of place `index` >= 0, never empty; a function of its arguments only."""


class ShardSource:
    """Windows of a token shard in a new random order each epoch; a share of them turned into
    fill-in-the-middle.

    Files longer than `window_tokens` are cut into windows, at the start of a top-level line where one is
    near, so a batch mixes many files. With probability `fim_rate` a window becomes one or more FIM
    documents of at most about `fim_tokens` tokens each. Conversations (shards with a loss mask) are never
    cut, windowed or FIM'd.
    """

    def __init__(
        self,
        shard: TokenShard,
        tokenizer: Tokenizer,
        *,
        window_tokens: int = 1024,
        fim_rate: float = 0.0,
        fim_tokens: int = 384,
        name: str | None = None,
    ) -> None:
        if window_tokens < 16 or not 0 <= fim_rate <= 1 or fim_tokens < 32:
            raise ConfigError(
                f"window_tokens={window_tokens}, fim_rate={fim_rate}, fim_tokens={fim_tokens}: no "
                "documents can be cut "
                "so. Fix: window_tokens >= 16, 0 <= fim_rate <= 1, fim_tokens >= 32."
            )
        self.name = name if name is not None else shard.name
        self.shard = shard
        self.tokenizer = tokenizer
        self.fim_rate = 0.0 if shard.loss is not None else fim_rate
        self.fim_tokens = fim_tokens
        self.has_splittable = shard.loss is None and self.fim_rate < 1
        self.fingerprint = f"{shard.key}/{window_tokens}/{self.fim_rate}/{fim_tokens}"
        self.windows = self._cut(window_tokens) if shard.loss is None else _spans(shard.offsets)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Windows in one epoch."""
        return len(self.windows)

    @property
    def num_tokens(self) -> int:
        """Tokens in one epoch, without BOS."""
        return len(self.shard.tokens)

    def _cut(self, window: int) -> npt.NDArray[np.int64]:
        """Windows as rows (start, end) [n, 2] into the shard's tokens; together they cover it."""
        token_bytes = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]
        ends_line = np.array([b.endswith(b"\n") for b in token_bytes])
        indents = np.array([b[:1].isspace() for b in token_bytes])
        rows: list[tuple[int, int]] = []
        for begin, stop in _spans(self.shard.offsets).tolist():
            start = begin
            while stop - start > window:
                # candidates for the first token of the next window
                after = np.arange(start + window // 2, start + window)
                at_line = ends_line[self.shard.tokens[after - 1]]
                at_top = at_line & ~indents[self.shard.tokens[after]]
                good = after[at_top] if at_top.any() else after[at_line]
                cut = int(good[-1]) if len(good) else start + window
                rows.append((start, cut))
                start = cut
            rows.append((start, stop))
        return np.array(rows, dtype=np.int64)

    def _shuffled(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(derive(seed, self.name, "order", epoch)).permutation(len(self.windows))

    def window(self, position: int) -> Document:
        """Window `position` in the shard's own order, untouched (for evaluation)."""
        start, end = self.windows[position].tolist()
        ids = np.empty(end - start + 1, dtype=np.int64)
        ids[0] = self.tokenizer.bos_token_id
        ids[1:] = self.shard.tokens[start:end]
        mask = np.ones(len(ids), dtype=np.bool_)
        if self.shard.loss is not None:
            mask[1:] = self.shard.loss[start:end]
        mask[0] = False
        return Document(ids, mask, is_splittable=self.shard.loss is None)

    def documents(self, seed: int, index: int) -> list[Document]:
        epoch, place = divmod(index, len(self.windows))
        document = self.window(int(self._order(seed, epoch)[place]))
        if not self.fim_rate:
            return [document]
        rng = random.Random(derive(seed, self.name, "fim", index))
        if rng.random() >= self.fim_rate:
            return [document]
        body = document.ids[1:]
        if body[-1] == self.tokenizer.eos_token_id:
            body = body[:-1]
        # A window cut inside a character (rare: a huge line) loses that character here.
        text = b"".join(map(self.tokenizer.token_bytes, body.tolist())).decode("utf-8", "ignore")
        if not text:
            return [document]
        # 0.8: a part may have more tokens a character than its window, and the cuts add a few.
        tokens = math.exp(rng.uniform(math.log(32), math.log(self.fim_tokens))) * 0.8
        target_chars = max(16, int(tokens * len(text) / len(body)))
        return [fim_document(part, self.tokenizer, rng) for part in split_for_fim(text, target_chars)]


def _spans(offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.stack([offsets[:-1], offsets[1:]], axis=1)


class GeneratorSource:
    """Endless synthetic documents: `make(rng)` returns pieces `(text, is_loss)`, e.g.
    `TaskFamily.train_document`; where the place in the stream matters, `make_at(rng, index)` does.

    `version` goes into the fingerprint; change it when the generator's output changes.
    """

    has_splittable = False

    def __init__(
        self,
        name: str,
        make: Callable[[random.Random], Iterable[tuple[str, bool]]],
        tokenizer: Tokenizer,
        *,
        version: str = "",
        make_at: Callable[[random.Random, int], Iterable[tuple[str, bool]]] | None = None,
    ) -> None:
        self.name = name
        self.fingerprint = f"{tokenizer.fingerprint}/{version}"
        self._make, self._make_at = make, make_at
        self._tokenizer = tokenizer

    def documents(self, seed: int, index: int) -> list[Document]:
        rng = random.Random(derive(seed, self.name, index))
        pieces = self._make(rng) if self._make_at is None else self._make_at(rng, index)
        return [Document(*encode_pieces(self._tokenizer, list(pieces)))]


def _spec_hash(family: TaskFamily) -> str:
    spec = json.dumps(family.spec(), sort_keys=True, default=str)
    return hashlib.sha256(spec.encode()).hexdigest()[:16]


def task_sources(
    tokenizer: Tokenizer,
    names: Iterable[str] | None = None,
    *,
    families: Mapping[str, TaskFamily] | None = None,
) -> list[GeneratorSource]:
    """One source per task family (all, or those named), called `task:NAME`.

    `families` defaults to `rorqual.data.tasks.families()`; pass your own for another world or size.
    Raises: ConfigError for a family that does not exist.
    """
    families = families if families is not None else tasks.families()
    chosen = list(families) if names is None else list(names)
    for name in chosen:
        if name not in families:
            raise ConfigError(
                f"There is no task family {name!r}. Nothing can be generated for it. "
                f"Fix: choose from {', '.join(sorted(families))}."
            )
    return [
        GeneratorSource(
            f"task:{name}", family.train_document, tokenizer, version=_spec_hash(family), make_at=family.document_at
        )
        for name, family in ((name, families[name]) for name in chosen)
    ]
