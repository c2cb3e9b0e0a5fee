"""Prometheus metrics under vLLM's names.

HTTP workers count in memory and send changes to the engine's process, which adds them up. So no count is lost when a
worker ends, and no file is needed, which a full disk would make fatal.
"""

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

MetricKey = tuple[str, str | int]  # a metric's name; and a counter's label, or a histogram's bucket or "sum"
MAX_FLUSH_DELAY_SECONDS = 0.2  # after which changes are sent at the latest
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
INTER_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
COUNTERS = {"vllm:prompt_tokens": "Prompt tokens.", "vllm:generation_tokens": "Generated tokens."}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Time from the request to its first token.", TTFT_BUCKETS),
    "vllm:inter_token_latency_seconds": ("Time between two tokens of a completion.", INTER_TOKEN_BUCKETS),
    "vllm:e2e_request_latency_seconds": ("Time from the request to its end.", E2E_BUCKETS),
}
REQUEST_SUCCESS = "vllm:request_success"
# By name, the key of the engine's stats and the help text.
ENGINE_GAUGES = {
    "vllm:num_requests_running": ("running", "Completions that are running."),
    "vllm:num_requests_waiting": ("waiting", "Completions that wait to be scheduled."),
    "vllm:kv_cache_usage_perc": ("cache_usage", "Fraction of the KV cache's pages in use; 1 is all."),
}
ENGINE_COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_queries", "Tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Tokens found in the prefix cache."),
    "vllm:num_preemptions": ("preemptions", "Sequences preempted to free their pages."),
}


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that only grows."""

    name: str
    add_count: Callable[[MetricKey, float], None]

    def inc(self, amount: float = 1) -> None:
        """Adds an amount."""
        self.add_count((self.name, ""), amount)


@dataclass(frozen=True, slots=True)
class Histogram:
    """The number of values in each bucket, and the sum of the values."""

    name: str
    add_count: Callable[[MetricKey, float], None]

    def observe(self, value: float) -> None:
        """Adds a value."""
        self.add_count((self.name, bisect_left(HISTOGRAMS[self.name][1], value)), 1)
        self.add_count((self.name, "sum"), value)


class Metrics:
    """The metrics of one HTTP worker. `send` is called with the changes since the last call."""

    def __init__(self, send: Callable[[dict[MetricKey, float]], None]) -> None:
        self._send, self._unsent_counts, self._timer = send, Counts[MetricKey](), None
        self.prompt_tokens, self.generation_tokens = (Counter(name, self._add_count) for name in COUNTERS)
        self.time_to_first_token, self.inter_token_latency, self.e2e_latency = (
            Histogram(name, self._add_count) for name in HISTOGRAMS
        )

    def record_finished(self, finish_reason: str) -> None:
        """Counts a completion that has ended."""
        self._add_count((REQUEST_SUCCESS, finish_reason), 1)

    def _add_count(self, key: MetricKey, amount: float) -> None:
        self._unsent_counts[key] += amount  # type: ignore[assignment]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_FLUSH_DELAY_SECONDS, self.flush)

    def flush(self) -> None:
        """Sends the changes, if there are any."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changes, self._unsent_counts = self._unsent_counts, Counts[MetricKey]()
        if changes:
            self._send(dict(changes))


class _Collector:
    """The metrics of all workers and of the engine, in prometheus_client's form."""

    def __init__(self, counts: Mapping[MetricKey, float], stats: dict[str, Any], model_name: str) -> None:
        self.counts, self.stats, self.model_name = counts, stats, model_name

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics, as a prometheus_client collector must."""
        labels = ["model_name"]
        for name, help_text in COUNTERS.items():
            counter = CounterMetricFamily(name, help_text, labels=labels)
            counter.add_metric([self.model_name], self.counts.get((name, ""), 0))
            yield counter
        for name, (help_text, bounds) in HISTOGRAMS.items():
            totals = accumulate(self.counts.get((name, i), 0) for i in range(len(bounds) + 1))
            buckets: Any = [*zip(map(floatToGoString, (*bounds, float("inf"))), totals, strict=True)]
            histogram = HistogramMetricFamily(name, help_text, labels=labels)
            histogram.add_metric([self.model_name], buckets, self.counts.get((name, "sum"), 0))
            yield histogram
        reasons = [*labels, "finished_reason"]
        finished = CounterMetricFamily(REQUEST_SUCCESS, "Completions that have ended, by reason.", labels=reasons)
        for (name, reason), count in self.counts.items():
            if name == REQUEST_SUCCESS:
                finished.add_metric([self.model_name, str(reason)], count)
        yield finished
        for family, metrics in ((GaugeMetricFamily, ENGINE_GAUGES), (CounterMetricFamily, ENGINE_COUNTERS)):
            for name, (key, help_text) in metrics.items():
                metric = family(name, help_text, labels=labels)
                metric.add_metric([self.model_name], self.stats[key])
                yield metric


def render_metrics(counts: Mapping[MetricKey, float], stats: dict[str, Any], model_name: str) -> bytes:
    """Returns all workers' counts and the engine's stats in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(counts, stats, model_name))  # type: ignore[arg-type]
    return generate_latest(registry)
