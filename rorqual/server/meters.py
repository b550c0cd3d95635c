"""Counters and histograms of requests, for Prometheus. What engines and caches count is in `metadata.py`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rorqual.money import PICOS
from rorqual.server.accounts import Outcome

_GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Meters:
    """The meters of one server; every server has a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.running = Gauge("rorqual_http_running", "Requests being answered.", registry=registry)
        self._requests = Counter(
            "rorqual_http_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self._refused = Counter(
            "rorqual_refused_requests", "Requests refused, by the error's code.", ["reason"], registry=registry
        )
        self._duration = Histogram(
            "rorqual_http_request_seconds",
            "From a request's headers to the last byte of its answer.",
            ["endpoint"],
            buckets=_WAITS_S,
            registry=registry,
        )
        self._first = Histogram(
            "rorqual_first_token_seconds",
            "From admission to the first token.",
            ["model"],
            buckets=_WAITS_S,
            registry=registry,
        )
        self._gap = Histogram(
            "rorqual_inter_token_seconds",
            "Between parts of a stream as sent, after the first token.",
            ["model"],
            buckets=_GAPS_S,
            registry=registry,
        )
        self._tokens = Counter(
            "rorqual_tokens",
            "Tokens of finished requests: hit and miss of prompts, completion of answers, reasoning among those.",
            ["model", "kind"],
            registry=registry,
        )
        self._cost = Counter("rorqual_cost", "What requests cost.", ["model", "currency"], registry=registry)
        self._ends = Counter("rorqual_finished_requests", "How requests ended.", ["model", "finish"], registry=registry)

    def gaps(self, model: str) -> Callable[[float], None]:
        """Where seconds between parts of a stream are told."""
        observe: Callable[[float], None] = self._gap.labels(model).observe
        return observe

    def answered(self, endpoint: str, status: int, duration_s: float, refusal: str | None) -> None:
        """A request was answered. refusal: the code of the error it got."""
        self._requests.labels(endpoint, str(status)).inc()
        self._duration.labels(endpoint).observe(duration_s)
        if refusal is not None:
            self._refused.labels(refusal).inc()

    def ended(self, outcome: Outcome) -> None:
        """A request that was admitted is over."""
        model, used = outcome.asked.model, outcome.used
        self._ends.labels(model, used.finish).inc()
        for kind, count in (
            ("hit", used.hit_tokens),
            ("miss", used.miss_tokens),
            ("completion", used.completion_tokens),
            ("reasoning", used.reasoning_tokens),
        ):
            self._tokens.labels(model, kind).inc(count)
        self._cost.labels(model, outcome.currency).inc(used.cost / PICOS)
        if outcome.first_token_s is not None:
            self._first.labels(model).observe(outcome.first_token_s)

    def text(self) -> str:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry).decode()
