"""What an answer says beyond the API: its `rorqual` object, and the server's counters for `/stats` and `/metrics`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rorqual.engine import Request
from rorqual.server.served import ServedModel


def metadata(request: Request) -> dict[str, Any]:
    """How the request ran: its id (for `/engine/picks`), seed, seconds in each phase, and what the prefix cache did for
    it and why.

    `cache` is None where there is no cache. `ended`: the engine's own reason, which says `timeout` where the API's
    finish reason can only say `length`.
    """
    timing = {name: round(seconds, 6) for name, seconds in dataclasses.asdict(request.timing).items()}
    return {
        "request": request.id,
        "seed": request.seed,
        "ended": request.finish_reason,
        "timing": timing,
        "cache": None if request.cache is None else request.cache.to_dict(),
    }


def statistics(model: ServedModel) -> dict[str, Any]:
    """The counters of one model's engine, of its prefix cache and of its streamed experts, as JSON."""
    engine = model.engine
    stats = engine.stats()
    out: dict[str, Any] = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    out["finished"], out["state_bytes"] = dict(stats.finished), dict(stats.state_bytes)
    cache = engine.prefix_cache
    if cache is not None:
        counts = cache.stats
        out["cache"] = {
            **{f.name: getattr(counts, f.name) for f in dataclasses.fields(counts) if f.name != "reasons"},
            "reasons": dict(counts.reasons),
            "memory_bytes": cache.tree.nbytes,
            "max_memory_bytes": cache.tree.budget,
            "evicted_pages": cache.tree.evicted_pages,
            "disk_bytes": None if cache.disk is None else cache.disk.nbytes,
            "disk_bytes_read": None if cache.disk is None else cache.disk.stats.bytes_read,
            "disk_bytes_written": None if cache.disk is None else cache.disk.stats.bytes_written,
            "turns": None if cache.turns is None else len(cache.turns),
        }
    experts = getattr(engine.model, "expert_cache", None)
    if experts is not None:
        out["experts"] = dataclasses.asdict(experts.stats())
    return out


_COUNTERS = {
    "rounds", "prefetch_hits", "misses", "bytes_read", "prefetches", "waited_s",
    "prompt_tokens", "sampled_tokens", "busy_s", "preemptions", "failed_steps", "requests", "hits",
    "cached_tokens", "disk_tokens", "replayed_tokens", "evicted_pages", "disk_bytes_read", "disk_bytes_written",
    "finished", "reasons",
}  # fmt: skip
_LABELS = {"finished": "reason", "reasons": "reason", "state_bytes": "kind"}


def metrics(models: Mapping[str, ServedModel]) -> str:
    """The same in Prometheus' text format: `rorqual_sampled_tokens_total{model="minke"} 1234`."""
    lines: dict[str, list[str]] = {}
    for name, model in models.items():
        numbers = statistics(model)
        cache, experts = numbers.pop("cache", {}), numbers.pop("experts", {})
        for prefix, group in (("rorqual", numbers), ("rorqual_cache", cache), ("rorqual_experts", experts)):
            for key, value in group.items():
                metric = f"{prefix}_{key}" + ("_total" if key in _COUNTERS else "")
                lines.setdefault(metric, []).extend(_samples(metric, key, value, name))
    out = []
    for metric, samples in lines.items():
        if samples:
            out += [f"# TYPE {metric} {'counter' if metric.endswith('_total') else 'gauge'}", *samples]
    return "\n".join(out) + "\n"


def _samples(metric: str, key: str, value: Any, model: str) -> Iterator[str]:
    label = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    if isinstance(value, Mapping):
        for part, number in value.items():
            yield f'{metric}{{model="{label}",{_LABELS[key]}="{part}"}} {number}'
    elif value is not None:
        yield f'{metric}{{model="{label}"}} {value}'
