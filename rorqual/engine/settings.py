"""An engine with its prefix cache, made from plain numbers: what a command line or a server's configuration gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.engine.engine import Engine
from rorqual.engine.guard import OFF
from rorqual.engine.prefix_cache import PrefixCache, Windows
from rorqual.errors import ConfigError
from rorqual.model.index_groups import search_index_by


@dataclass(frozen=True)
class CacheSettings:
    """What is kept for later requests, and where; see `PrefixCache`."""

    memory_bytes: int = 1 << 30
    folder: Path | None = None
    disk_bytes: int = 8 << 30
    write_bytes_per_hour: int | None = None
    windows: Windows = "zero"
    period: int | None = None


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine (see `Engine`), and its cache; None: every prompt is computed from its first token."""

    max_running: int = 8
    max_queued: int = 64
    chunk: int = 512
    context_limit: int | None = None
    max_state_bytes: int | None = None
    cache: CacheSettings | None = None
    speculate: bool = False
    index_search: str | None = None
    guard: str = OFF

    @contextmanager
    def open(self, model: Any, tokenizer: Any) -> Iterator[Engine]:  # Any: what Engine takes
        """The engine, closed with its cache afterwards. Raises: ConfigError for settings that cannot work, or when the
        cache's folder cannot be used.
        """
        if self.index_search is not None and self.index_search != model.cfg.index_search:
            search_index_by(model, self.index_search)  # before the cache, whose contents depend on it
        cache = self._cache(model, tokenizer)
        try:
            with Engine(
                model,
                tokenizer,
                max_running=self.max_running,
                max_queued=self.max_queued,
                chunk=self.chunk,
                context_limit=self.context_limit,
                max_state_bytes=self.max_state_bytes,
                prefix_cache=cache,
                speculate=self.speculate,
                index_search=self.index_search,
                guard=self.guard,
            ) as engine:
                yield engine
        finally:
            if cache is not None:
                cache.close()

    def _cache(self, model: Any, tokenizer: Any) -> PrefixCache | None:
        if self.cache is None:
            return None
        context = int(model.cfg.max_position_embeddings) if self.context_limit is None else max(1, self.context_limit)
        try:
            return PrefixCache(
                model,
                memory_bytes=self.cache.memory_bytes,
                running_tokens=self.max_running * context,  # reserved, and handed out as it is touched
                folder=self.cache.folder,
                disk_bytes=self.cache.disk_bytes,
                write_bytes_per_hour=self.cache.write_bytes_per_hour,
                windows=self.cache.windows,
                period=self.cache.period,
                tokenizer=tokenizer,
            )
        except OSError as error:
            raise ConfigError(
                f"the cache folder {self.cache.folder} cannot be used ({error.strerror or error}), so nothing could be "
                "kept there. Name a folder that you may write to."
            ) from error
