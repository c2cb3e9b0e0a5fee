"""Prometheus metrics under vLLM's names. The workers count, in files that whoever is asked adds up; what the engine
holds at the moment is asked of it."""

import os
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
GAPS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """What a worker counts."""

    def __init__(self, model: str) -> None:
        own = CollectorRegistry()  # never shown: the files are
        label = {"labelnames": ["model_name"], "registry": own}
        self.model = model
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens.", **label).labels(model)
        self.tokens = Counter("vllm:generation_tokens", "Generated tokens.", **label).labels(model)
        self.first = Histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", buckets=FIRST, **label
        ).labels(model)
        self.gap = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a completion.", buckets=GAPS, **label
        ).labels(model)
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its end.", buckets=WHOLE, **label
        ).labels(model)
        self.ended = Counter(
            "vllm:request_success",
            "Completions that ended, and why.",
            labelnames=["model_name", "finished_reason"],
            registry=own,
        )

    def finished(self, reason: str) -> None:
        """A completion ended."""
        self.ended.labels(self.model, reason).inc()


class _Engine:
    """The engine's figures, as a collector."""

    def __init__(self, stats: dict[str, Any], model: str) -> None:
        self.stats, self.model = stats, model

    def collect(self) -> Iterator[Metric]:
        """In the form prometheus_client wants."""
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
                family.add_metric([self.model], self.stats[key])
                yield family


def exposition(stats: dict[str, Any], model: str) -> bytes:
    """All workers' counts and the engine's figures, as Prometheus reads them."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, os.environ[FOLDER])
    registry.register(_Engine(stats, model))  # type: ignore[arg-type]
    return generate_latest(registry)
