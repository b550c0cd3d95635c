"""The retrieval guard as a setting: which of its sources are on, and what an answer says about it.

An indexer chooses k entries of a long text and may overlook the one that holds the answer. The guard shows queries more
(`model/guard.py`): never less than the indexer picks. Every source can be switched by itself. What is shown depends on
a request's tokens and its guard alone, so outputs are as reproducible as without; what the prefix cache holds under one
guard is not used under another. Source: evaluation specification, section 6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.config import ModelConfig
from rorqual.engine.interfaces import TextTokenizer
from rorqual.errors import ConfigError, RequestError
from rorqual.model import Transformer
from rorqual.model.guard import KINDS, Guard, Rules, bytes_factor
from rorqual.ops.forced_entries import ANSWERS, ASKS, Policy

SOURCES = ("anchors", "pinned", "lexical", "extra", "temporal", "neighbours", "recheck")
DEFAULT = ("anchors", "pinned", "lexical")
LAYER_CODE = frozenset(("temporal", "neighbours", "recheck"))
"""These read scores or other layers' picks; the fused step does not, so every token takes the layer code's time."""
OFF, ON = "off", "default"

FIRST, LAST = 8, 32
SYSTEM_FIRST, SYSTEM_LAST, PINNED = 64, 32, 128
LEXICAL = 192
FACTOR = 1.2
MARGIN = 1e-3
"""Sizes of the specification: entries, the factor that a CSA layer's bytes may grow by, and the part of the scores'
standard deviation below which the k-th entry is not told from the next."""


def sources_of(text: str) -> tuple[str, ...]:
    """`off`, `default`, or names of sources with commas between -> the sources, in order.

    Raises: ConfigError for a name that is none.
    """
    if text == OFF:
        return ()
    if text == ON:
        return DEFAULT
    names = [name.strip() for name in text.split(",")]
    wrong = next((name for name in names if name not in SOURCES), None)
    if wrong is not None:
        raise ConfigError(
            f"The guard has no source {wrong!r}. Give {OFF}, {ON} (that is {','.join(DEFAULT)}), or some of "
            f"{', '.join(SOURCES)} with commas between."
        )
    return tuple(name for name in SOURCES if name in names)


def rules_of(cfg: ModelConfig, sources: Sequence[str]) -> Rules:
    """What these sources do for a model. Raises: ConfigError when it has no indexer to guard."""
    ratio = next((spec.compress_ratio for spec in cfg.layers if spec.has_indexer), None)
    if ratio is None:
        raise ConfigError(
            "A retrieval guard was asked for, and this model has no indexer that could overlook anything: its layers "
            "read all they remember. Leave the guard off."
        )
    has = set(sources).__contains__
    policy = Policy(
        ratio, cfg.sliding_window,
        first=FIRST * has("anchors"), last=LAST * has("anchors"),
        system_first=SYSTEM_FIRST * has("pinned"), system_last=SYSTEM_LAST * has("pinned"),
        pinned_most=PINNED * has("pinned"), lexical_most=LEXICAL * has("lexical"),
    )  # fmt: skip
    return Rules(
        policy, FACTOR if has("extra") else 0.0, has("neighbours"), has("temporal"), MARGIN if has("recheck") else 0.0
    )


@dataclass(frozen=True)
class GuardUse:
    """What a guard did for one request, for response metadata."""

    sources: tuple[str, ...]
    forced: dict[str, int]
    """Entries shown by kind, over all queries that had a choice; some the indexer picked too."""
    queries: int
    rechecked: int
    entries_added: float
    """Most entries that a query read beyond the model's k, mean over queries."""
    bytes_factor: float
    """Bytes that a CSA layer reads at the end of the text, over those without a guard (rows as V4 is served): most."""
    step: str
    """`fused`, or `layers`: the slower layer code ran every token."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Guards:
    """Makes guards for an engine's requests. `setting`: for those that say nothing. Raises: ConfigError."""

    def __init__(self, model: Any, tokenizer: TextTokenizer, setting: str, has_cache: bool) -> None:
        self._model, self._tokenizer, self._has_cache, self.setting = model, tokenizer, has_cache, setting
        self._rules: dict[tuple[str, ...], Rules] = {}
        self._made(sources_of(setting))

    @cached_property
    def _roles(self) -> NDArray[np.uint8]:
        return roles_of(self._tokenizer, int(self._model.cfg.vocab_size))

    def _made(self, sources: tuple[str, ...]) -> Rules | None:
        if not sources:
            return None
        if sources not in self._rules:
            if not isinstance(self._model, Transformer):
                raise ConfigError(
                    f"A retrieval guard works inside a rorqual.Transformer, and this engine runs a "
                    f"{type(self._model).__name__}. Leave the guard off."
                )
            if "temporal" in sources and self._has_cache:
                raise ConfigError(
                    "The guard's source `temporal` reads what earlier tokens picked, which the prefix cache does not "
                    "hold. Run without the cache, or leave the source out; `extra` covers what it does."
                )
            self._rules[sources] = rules_of(self._model.cfg, sources)
        return self._rules[sources]

    def of(self, asked: str | None, pins: Sequence[tuple[int, int]]) -> Guard | None:
        """The guard of a request that asks for `asked` (None: the engine's setting). Raises: RequestError."""
        try:
            rules = self._made(sources_of(self.setting if asked is None else asked))
            if rules is None:
                return None
            return Guard(self._model.cfg, rules, self._roles, pins if rules.policy.pinned_most else ())
        except ConfigError as error:
            raise RequestError(str(error), param="guard") from error

    def scope(self, guard: Guard | None, scope: str) -> str:
        """The prefix cache's scope of a request: what was read under one guard is another's no more."""
        if guard is None:
            return scope
        told = repr((guard.rules, guard.pins, self._roles.nonzero()[0].tolist()))
        return f"{scope}|guard:{hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"


def roles_of(tokenizer: TextTokenizer, vocab_size: int) -> NDArray[np.uint8]:
    """uint8 [V]: which token begins what a user says, and which an answer; none if a tokenizer has no such tokens."""
    roles = np.zeros(vocab_size, np.uint8)
    for text, role in (("<｜User｜>", ASKS), ("<｜Assistant｜>", ANSWERS)):
        ids = tokenizer.encode(text)
        if len(ids) == 1 and ids[0] in tokenizer.control_token_ids:
            roles[ids[0]] = role
    return roles


def use_of(guard: Guard) -> GuardUse:
    """What it did so far."""
    rules, policy = guard.rules, guard.rules.policy
    is_on = {
        "anchors": policy.first or policy.last, "pinned": policy.pinned_most, "lexical": policy.lexical_most,
        "extra": rules.extra, "temporal": rules.temporal, "neighbours": rules.neighbours, "recheck": rules.recheck,
    }  # fmt: skip
    added = guard.added / max(1, guard.queries)
    return GuardUse(
        sources=tuple(name for name in SOURCES if is_on[name]),
        forced=dict(zip(KINDS, guard.counts, strict=True)),
        queries=guard.queries,
        rechecked=guard.rechecked,
        entries_added=round(added, 1),
        bytes_factor=round(bytes_factor(guard.cfg, guard.grams.length, added), 4),
        step="layers" if rules.needs_layer_code else "fused",
    )
