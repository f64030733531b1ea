"""What the server counts, in the form that Prometheus reads.

For `app.py` and those that count. Apart because what the engine counts itself is only read, when
somebody asks, and what the server counts is added up as it happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from bitnet_rs import __version__

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from bitnet_rs.engine import Event, Running
    from bitnet_rs.model import Model

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_DURATION = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# Name, field of `EngineStats`, help.
_GAUGES = (
    ("queue_length", "waiting", "Sequences that wait to be admitted"),
    ("active_sequences", "active", "Sequences that run"),
    ("batch_tokens", "batch_tokens", "Tokens in the last step"),
    ("kv_bytes", "kv_bytes", "Memory of keys and values, kept prefixes included"),
    ("kv_limit_bytes", "kv_limit", "The most that keys and values may take"),
    ("kept_prefixes", "prefixes", "Finished sequences whose keys and values are kept"),
)
_COUNTERS = (
    ("steps", "steps", "Steps computed"),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens computed"),
    ("prompt_tokens_cached", "cached_tokens", "Prompt tokens that needed no computing"),
    ("generated_tokens", "generated_tokens", "Tokens generated"),
    ("prefix_cache_lookups", "prefix_lookups", "Prompts that were begun"),
    ("prefix_cache_hits", "prefix_hits", "Prompts that began with keys and values at hand"),
    ("finished_sequences", "finished", "Sequences that ended, for whatever reason"),
)


class _EngineCollector(Collector):
    """The engine's own numbers, as they are when somebody asks."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._model.runner.stats()
        for name, field, text in _GAUGES:
            yield GaugeMetricFamily(f"bitnet_rs_{name}", text, getattr(stats, field))
        for name, field, text in _COUNTERS:
            yield CounterMetricFamily(f"bitnet_rs_{name}", text, getattr(stats, field))

    def describe(self) -> Iterator[Metric]:
        return iter(())  # so that registering does not start the engine


class _InfoCollector(Collector):
    """Which model, on what."""

    def __init__(self, model: Model, name: str) -> None:
        self._labels = {"model": name, "version": __version__, "kernel": model.kernel}

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("bitnet_rs_model", "The model that is served", self._labels)


class Metrics:
    """Everything that is counted for one server.

    Args:
        model: Whose engine is read.
        name: What the model is called.
    """

    def __init__(self, model: Model, name: str) -> None:
        # Its own registry: a process may serve several models, and tests do.
        self._registry = CollectorRegistry()
        self._registry.register(_InfoCollector(model, name))
        if not model.checkpoint.embedding:
            self._registry.register(_EngineCollector(model))
        self._requests = Counter(
            "bitnet_rs_requests",
            "Requests answered; status 499: the client left before",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._durations = Histogram(
            "bitnet_rs_request_seconds",
            "From a request to the end of its answer",
            ("endpoint",),
            buckets=_DURATION,
            registry=self._registry,
        )
        self._first = Histogram(
            "bitnet_rs_time_to_first_token_seconds",
            "From handing in a sequence to its first token, waiting included",
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self._between = Histogram(
            "bitnet_rs_inter_token_seconds",
            "From one token of a sequence to its next",
            buckets=_BETWEEN_TOKENS,
            registry=self._registry,
        )

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._durations.labels(endpoint).observe(seconds)

    def tokens(self, sequence: Running, last: float | None, events: Sequence[Event]) -> float:
        """Counts a sequence's new events; returns the time of the last, for the next call."""
        for event in events:
            if last is None:
                self._first.observe(event.time - sequence.submitted)
            elif event.token is not None:
                self._between.observe(event.time - last)
            last = event.time
        assert last is not None  # there is an event whenever this is called
        return last

    def text(self) -> bytes:
        """What Prometheus is answered."""
        return generate_latest(self._registry)
