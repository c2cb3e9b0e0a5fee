"""Prometheus metrics under vLLM's names.

HTTP workers count in memory and send changes to the engine's process, which adds them up. So no count is lost when a
worker ends, and no file is needed, which a full disk would make fatal.
"""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

MetricKey = tuple[str, str | int]  # a metric's name; and a counter's label, or a histogram's bucket or "sum"
MAX_FLUSH_DELAY_SECONDS = 0.2  # after which changes are sent at the latest
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
INTER_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
REQUEST_SUCCESS = "vllm:request_success"  # the counter whose label is the finish reason
PROMPT_TOKENS, GENERATION_TOKENS = "vllm:prompt_tokens", "vllm:generation_tokens"
COUNTERS = {PROMPT_TOKENS: "Prompt tokens.", GENERATION_TOKENS: "Generated tokens."}
TTFT, INTER_TOKEN_LATENCY = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
E2E_LATENCY = "vllm:e2e_request_latency_seconds"
HISTOGRAMS = {
    TTFT: ("Time from the request to its first token.", TTFT_BUCKETS),
    INTER_TOKEN_LATENCY: ("Time between two tokens of a completion.", INTER_TOKEN_BUCKETS),
    E2E_LATENCY: ("Time from the request to its end.", E2E_BUCKETS),
}
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


class Metrics:
    """The metrics of one HTTP worker. `send` is called with the changes since the last call."""

    def __init__(self, send: Callable[[dict[MetricKey, float]], None]) -> None:
        self._send, self._unsent_counts, self._timer = send, Counter[MetricKey](), None

    def count(self, name: str, amount: float = 1, label: str | int = "") -> None:
        """Adds an amount to a counter, or to a bucket or the sum of a histogram."""
        self._unsent_counts[name, label] += amount  # type: ignore[assignment]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_FLUSH_DELAY_SECONDS, self.flush)

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram."""
        self.count(name, label=bisect_left(HISTOGRAMS[name][1], value))
        self.count(name, value, "sum")

    def flush(self) -> None:
        """Sends the changes, if there are any."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changes, self._unsent_counts = self._unsent_counts, Counter[MetricKey]()
        if changes:
            self._send(dict(changes))


def render_metrics(counts: Mapping[MetricKey, float], stats: dict[str, Any], model_name: str) -> bytes:
    """Returns all workers' counts and the engine's stats in Prometheus's text format."""
    families, labels = list[Any](), ["model_name"]
    values = [(CounterMetricFamily, name, text, counts.get((name, ""), 0)) for name, text in COUNTERS.items()]
    for family, metrics in ((GaugeMetricFamily, ENGINE_GAUGES), (CounterMetricFamily, ENGINE_COUNTERS)):
        values += [(family, name, text, stats[key]) for name, (key, text) in metrics.items()]
    for family, name, help_text, value in values:
        families.append(family(name, help_text, labels=labels))
        families[-1].add_metric([model_name], value)
    for name, (help_text, bounds) in HISTOGRAMS.items():
        totals = accumulate(counts.get((name, i), 0) for i in range(len(bounds) + 1))
        buckets: Any = [*zip(map(floatToGoString, (*bounds, float("inf"))), totals, strict=True)]
        families.append(HistogramMetricFamily(name, help_text, labels=labels))
        families[-1].add_metric([model_name], buckets, counts.get((name, "sum"), 0))
    finished_text = "Completions that have ended, by reason."
    finished = CounterMetricFamily(REQUEST_SUCCESS, finished_text, labels=[*labels, "finished_reason"])
    for (name, reason), count in counts.items():
        if name == REQUEST_SUCCESS:
            finished.add_metric([model_name, str(reason)], count)
    return generate_latest(SimpleNamespace(collect=lambda: [*families, finished]))  # type: ignore[arg-type]
