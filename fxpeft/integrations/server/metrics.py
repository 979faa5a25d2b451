"""What ``/metrics`` tells, by prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fxpeft.serving.residents import StoreStats

NOW = ("names", "residents", "in_use", "resident_bytes", "max_bytes", "quarantined")  # what goes up and down


class Metrics:
    """One server's; no label has a value that a client chooses."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("fxpeft_requests", "Requests answered.", ("path", "code"), registry=self.registry)
        self.seconds = Histogram("fxpeft_request_seconds", "Time of a request.", ("path",), registry=self.registry)
        self.running = Gauge("fxpeft_requests_running", "Requests under way.", registry=self.registry)

    def answered(self, path: str, status: int | None, seconds: float) -> None:
        """Count a request; ``status``: 499 where the client went before it was answered."""
        self.requests.labels(path, str(status or 499)).inc()
        self.seconds.labels(path).observe(seconds)

    def watch(self, stats: Callable[[], StoreStats], tokens: Callable[[], tuple[int, int]]) -> None:
        """Tell what is in a store, and the tokens of prompts and answers."""
        self.registry.register(_Watched(stats, tokens))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(self, stats: Callable[[], StoreStats], tokens: Callable[[], tuple[int, int]]) -> None:
        self._stats, self._tokens = stats, tokens

    def collect(self) -> Iterable[Metric]:
        stats, (prompt, made) = self._stats(), self._tokens()
        for each in fields(stats):
            family = GaugeMetricFamily if each.name in NOW else CounterMetricFamily
            yield family(f"fxpeft_adapter_{each.name}", "See fxpeft.AdapterStore.", value=getattr(stats, each.name))
        yield CounterMetricFamily("fxpeft_prompt_tokens", "Tokens of prompts.", value=prompt)
        yield CounterMetricFamily("fxpeft_generation_tokens", "Tokens of answers.", value=made)
