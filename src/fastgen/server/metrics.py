"""Prometheus metrics under vLLM's names. Workers count in memory and send what has changed to the engine's process,
which adds it up; so nothing is lost with a worker, and no file is needed that a full disk would make fatal."""

import asyncio
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

MetricKey = tuple[str, str | int]  # a metric's name; the label of a counter, or a histogram's bucket, or its "sum"
TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
INTER_TOKEN_LATENCY_BUCKETS = (
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
E2E_LATENCY_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
MAX_FLUSH_DELAY_SECONDS = 0.2  # seconds after which counts are sent at the latest
COUNTERS = {"vllm:prompt_tokens": "Prompt tokens.", "vllm:generation_tokens": "Generated tokens."}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From the request to its first token.", TIME_TO_FIRST_TOKEN_BUCKETS),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a completion.", INTER_TOKEN_LATENCY_BUCKETS),
    "vllm:e2e_request_latency_seconds": ("From the request to its end.", E2E_LATENCY_BUCKETS),
}
REQUEST_SUCCESS = "vllm:request_success"


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that grows."""

    name: str
    add_count: Callable[[MetricKey, float], None]

    def inc(self, amount: float = 1) -> None:
        """Add to it."""
        self.add_count((self.name, ""), amount)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values there were up to each of some bounds, and their sum."""

    name: str
    add_count: Callable[[MetricKey, float], None]

    def observe(self, value: float) -> None:
        """Take a value."""
        self.add_count((self.name, bisect_left(HISTOGRAMS[self.name][1], value)), 1)
        self.add_count((self.name, "sum"), value)


class Metrics:
    """What a worker counts. `send` takes what has changed since it was called last."""

    def __init__(self, send: Callable[[dict[MetricKey, float]], None]) -> None:
        self._send, self._unsent_counts, self._timer = send, Counts[MetricKey](), None
        self.prompt_tokens, self.generation_tokens = (Counter(name, self._add_count) for name in COUNTERS)
        self.time_to_first_token, self.inter_token_latency, self.e2e_latency = (
            Histogram(name, self._add_count) for name in HISTOGRAMS
        )

    def record_finished(self, finish_reason: str) -> None:
        """A completion ended."""
        self._add_count((REQUEST_SUCCESS, finish_reason), 1)

    def _add_count(self, key: MetricKey, amount: float) -> None:
        self._unsent_counts[key] += amount  # type: ignore[assignment]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_FLUSH_DELAY_SECONDS, self.flush)

    def flush(self) -> None:
        """Send what has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changes, self._unsent_counts = self._unsent_counts, Counts[MetricKey]()
        if changes:
            self._send(dict(changes))


class _Collector:
    """All figures, in the form that prometheus_client wants."""

    def __init__(self, counts: Mapping[MetricKey, float], stats: dict[str, Any], model_name: str) -> None:
        self.counts, self.stats, self.model_name = counts, stats, model_name

    def collect(self) -> Iterator[Metric]:
        """Of the workers, and of the engine."""
        for name, about in COUNTERS.items():
            family = CounterMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self.model_name], self.counts.get((name, ""), 0))
            yield family
        for name, (about, bounds) in HISTOGRAMS.items():
            totals = [*accumulate(self.counts.get((name, i), 0) for i in range(len(bounds) + 1))]
            named = [*map(floatToGoString, (*bounds, float("inf")))]
            histogram = HistogramMetricFamily(name, about, labels=["model_name"])
            pairs = [*zip(named, totals, strict=True)]
            histogram.add_metric([self.model_name], pairs, self.counts.get((name, "sum"), 0))  # type: ignore[arg-type]
            yield histogram
        ended = CounterMetricFamily(
            REQUEST_SUCCESS, "Completions that ended, and why.", labels=["model_name", "finished_reason"]
        )
        for (name, reason), count in self.counts.items():
            if name == REQUEST_SUCCESS:
                ended.add_metric([self.model_name, str(reason)], count)
        yield ended
        gauges = {
            "vllm:num_requests_running": ("running", "Completions that run."),
            "vllm:num_requests_waiting": ("waiting", "Completions that wait for room."),
            "vllm:kv_cache_usage_perc": ("cache_usage", "Of the cache's pages, those that are held; 1 is all."),
        }
        counters = {
            "vllm:prefix_cache_queries": ("prefix_queries", "Tokens of sequences that began to run."),
            "vllm:prefix_cache_hits": ("prefix_hits", "Of those, the ones found in the cache."),
            "vllm:num_preemptions": ("preemptions", "Sequences that gave up their pages to others."),
        }
        for kind, families in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (key, about) in families.items():
                family = kind(name, about, labels=["model_name"])
                family.add_metric([self.model_name], self.stats[key])
                yield family


def render_metrics(counts: Mapping[MetricKey, float], stats: dict[str, Any], model_name: str) -> bytes:
    """All workers' counts and the engine's figures, as Prometheus reads them."""
    registry = CollectorRegistry()
    registry.register(_Collector(counts, stats, model_name))  # type: ignore[arg-type]
    return generate_latest(registry)
