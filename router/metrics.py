"""Prometheus metrics: what the router counts itself, and what it reads from others when scraped.

Owns the registry and all names (prefix `router_`; with `vllm_names` the common vLLM names too, made
of the same values). Must not know where the numbers come from: flow calls `of_model(...)` and the
counters, the fleet and the queues register a function that gives samples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.protocol import Stats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

ENGINE_STATES: Final = ("starting", "serving", "draining", "hung", "dead", "parked", "asleep")

LATENCY_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80,
)  # fmt: skip
TOKEN_BUCKETS: Final = tuple(2**power for power in range(18))

# own family name -> vLLM's name; labels `model` -> `model_name`, `replica` -> `engine`
VLLM_NAMES: Final = {
    "router_requests_waiting": "vllm:num_requests_waiting",
    "router_requests_running": "vllm:num_requests_running",
    "router_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "router_prompt_tokens": "vllm:prompt_tokens",
    "router_generation_tokens": "vllm:generation_tokens",
    "router_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "router_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "router_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "router_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "router_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "router_request_success": "vllm:request_success",
    "router_request_prompt_tokens": "vllm:request_prompt_tokens",
    "router_request_generation_tokens": "vllm:request_generation_tokens",
    "router_request_max_tokens": "vllm:request_max_num_generation_tokens",
    "router_prefix_cache_queries": "vllm:prefix_cache_queries",
    "router_prefix_cache_hits": "vllm:prefix_cache_hits",
    "router_preemptions": "vllm:num_preemptions",
    "router_kv_cache_config": "vllm:cache_config_info",
}


class ReplicaSample(NamedTuple):
    """One engine's numbers at the moment of a scrape."""

    model: str
    replica: int
    state: str  # one of ENGINE_STATES
    running: int  # requests it works on, as the router sees it
    progress_age_s: float  # since its last sign of progress; 0 when idle
    block_size: int
    stats: Stats


class QueueSample(NamedTuple):
    """One model's admission queue at the moment of a scrape."""

    model: str
    waiting: int
    permits_used: int
    permits: int


class Tally:
    """One label's histogram of what happens per token: it only counts, until it is scraped.

    prometheus_client's own takes locks and walks all buckets: ten times the cost.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        """`buckets` are upper bounds, themselves included, rising."""
        self._bounds = (*buckets, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One value, no NaN."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, label: str) -> None:
        """As samples."""
        below = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip(self._bounds, self._counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == inf else str(float(bound)), below))
        family.add_metric([label], buckets, self._sum)


class ModelMetrics:
    """The per-request series of one model, bound once: an observation costs a few microseconds."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.ttft_s = metrics.ttft_s.labels(model)
        self.itl_s = Tally(LATENCY_BUCKETS_S)
        self.tpot_s = metrics.tpot_s.labels(model)
        self.e2e_s = metrics.e2e_s.labels(model)
        self.queue_s = metrics.queue_s.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.generation_tokens = metrics.generation_tokens.labels(model)
        self.request_prompt_tokens = metrics.request_prompt_tokens.labels(model)
        self.request_generation_tokens = metrics.request_generation_tokens.labels(model)
        self.request_max_tokens = metrics.request_max_tokens.labels(model)


class Metrics:
    """All series. Labels are only ever our own words: model names, replica numbers, codes."""

    def __init__(self, *, vllm_names: bool = False) -> None:
        self._vllm_names = vllm_names
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"router_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"router_{name}", text, ("model",), buckets=buckets, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return histogram(f"{name}_seconds", text, LATENCY_BUCKETS_S)

        self.requests = counter("requests", "Requests by answer", "model", "route", "status")
        self.errors = counter("errors", "Requests that failed, by error code", "code")
        self.success = counter("request_success", "Answers", "model", "finished_reason")
        self.ttft_s = seconds("time_to_first_token", "Arrival to first token")
        self.tpot_s = seconds("time_per_output_token", "Mean time per token of one answer")
        self.e2e_s = seconds("e2e_request_latency", "Arrival to last byte")
        self.queue_s = seconds("request_queue_time", "Wait for a permit")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens", "model")
        self.generation_tokens = counter("generation_tokens", "Generated tokens", "model")
        self.request_prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS
        )
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a request", TOKEN_BUCKETS
        )
        self.request_max_tokens = histogram(
            "request_max_tokens", "Tokens that a request allowed", TOKEN_BUCKETS
        )
        self.refused = counter("requests_refused", "Refused with 503: no room", "model")
        self.migrated = counter("requests_migrated", "Sequences that went on elsewhere", "reason")
        self.quarantined = counter("requests_quarantined", "Engines died of the prompt")
        self.shutdown_aborted = counter("shutdown_aborted_requests", "Cut at the drain deadline")
        self.restarts = counter("engine_restarts", "Restarts", "model", "replica", "cause")
        self.bad_frames = counter("ipc_bad_frames", "Frames that do not decode or are nonsense")
        self.stale_frames = counter("ipc_stale_frames", "Frames of engines that are gone")
        self.dropped = counter("ipc_messages_dropped", "Messages lost between router and engine")
        self.log_lines_lost = Gauge("router_log_lines_lost", "Log lines lost", registry=registry)
        self.connections = Gauge("router_connections", "Open connections", registry=registry)
        self.connections_refused = Gauge(
            "router_connections_refused", "Connections that found no room", registry=registry
        )
        self.loop_lag_s = Histogram(
            "router_event_loop_lag_seconds",
            "How late the event loop was",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1),
            registry=registry,
        )
        self.loop_lag_max_s = Gauge(
            "router_event_loop_lag_max_seconds", "Worst lag of the last minute", registry=registry
        )
        self._models: dict[str, ModelMetrics] = {}
        registry.register(_GapCollector(self._models))

    def of_model(self, model: str) -> ModelMetrics:
        """The series of `model`; the name must be one that is served."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def add_replicas(self, read: Callable[[], Iterable[ReplicaSample]]) -> None:
        """`read` is called at each scrape."""
        self._registry.register(_ReplicaCollector(read))

    def add_queues(self, read: Callable[[], Iterable[QueueSample]]) -> None:
        """`read` is called at each scrape."""
        self._registry.register(_QueueCollector(read))

    def render(self) -> bytes:
        """The text exposition format (`CONTENT_TYPE`)."""
        families = [_without_created(family) for family in self._registry.collect()]
        if self._vllm_names:
            families += [_as_vllm(f) for f in families if f.name in VLLM_NAMES]
        return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _GapCollector(Collector):
    def __init__(self, models: dict[str, ModelMetrics]) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "router_inter_token_latency_seconds", "Between tokens of one answer", labels=["model"]
        )
        for name, series in self._models.items():
            series.itl_s.add_to(family, name)
        yield family


class _ReplicaCollector(Collector):
    def __init__(self, read: Callable[[], Iterable[ReplicaSample]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        samples = list(self._read())
        state = GaugeMetricFamily(
            "router_engine_state", "1 for the state it is in", labels=["model", "replica", "state"]
        )
        for sample in samples:
            for name in ENGINE_STATES:
                labels = [sample.model, str(sample.replica), name]
                state.add_metric(labels, float(name == sample.state))
        yield state
        config = GaugeMetricFamily(
            "router_kv_cache_config",
            "Shape of the KV cache",
            labels=["model", "replica", "block_size", "num_gpu_blocks"],
        )
        for s in samples:
            shape = [str(s.block_size), str(s.stats.blocks_total)]
            config.add_metric([s.model, str(s.replica), *shape], 1.0)
        yield config
        yield from _replica_gauges(samples)
        yield from _replica_counters(samples)


def _replica_gauges(samples: list[ReplicaSample]) -> Iterator[Metric]:
    series: dict[str, tuple[str, Callable[[ReplicaSample], float]]] = {
        "requests_running": ("Requests an engine works on", lambda s: s.running),
        "engine_progress_age_seconds": ("Since the last progress", lambda s: s.progress_age_s),
        "engine_queue": ("Sequences waiting inside the engine", lambda s: s.stats.waiting),
        "kv_usage_ratio": ("Held share of the KV blocks", _kv_usage),
        "kv_blocks": ("KV blocks", lambda s: s.stats.blocks_total),
        "kv_blocks_held": ("KV blocks in use", lambda s: s.stats.blocks_held),
        "kv_blocks_cached": ("KV blocks kept for reuse", lambda s: s.stats.blocks_cached),
        "kv_blocks_leaked": ("KV blocks lost; always 0", lambda s: s.stats.blocks_leaked),
    }
    for name, (text, value) in series.items():
        family = GaugeMetricFamily(f"router_{name}", text, labels=["model", "replica"])
        for sample in samples:
            family.add_metric([sample.model, str(sample.replica)], float(value(sample)))
        yield family


def _kv_usage(sample: ReplicaSample) -> float:
    stats = sample.stats
    return stats.blocks_held / stats.blocks_total if stats.blocks_total else 0.0


def _replica_counters(samples: list[ReplicaSample]) -> Iterator[Metric]:
    series: dict[str, tuple[str, Callable[[Stats], int]]] = {
        "engine_steps": ("Steps", lambda s: s.steps),
        "engine_prompt_tokens": ("Prompt tokens computed", lambda s: s.prompt_tokens),
        "engine_generated_tokens": ("Tokens generated", lambda s: s.generated_tokens),
        "prefix_cache_queries": ("Prompt tokens looked up", lambda s: s.prefix_query_tokens),
        "prefix_cache_hits": ("Prompt tokens found", lambda s: s.prefix_hit_tokens),
        "preemptions": ("Preemptions", lambda s: s.preemptions),
        "engine_bad_frames": ("Frames an engine could not read", lambda s: s.bad_frames),
    }
    for name, (text, value) in series.items():
        family = CounterMetricFamily(f"router_{name}", text, labels=["model", "replica"])
        for sample in samples:
            family.add_metric([sample.model, str(sample.replica)], float(value(sample.stats)))
        yield family


class _QueueCollector(Collector):
    def __init__(self, read: Callable[[], Iterable[QueueSample]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        samples = list(self._read())
        series: dict[str, tuple[str, Callable[[QueueSample], int]]] = {
            "requests_waiting": ("Requests waiting for a permit", lambda q: q.waiting),
            "permits_used": ("Permits in use", lambda q: q.permits_used),
            "permits": ("Permits: ready replicas x max-concurrency", lambda q: q.permits),
        }
        for name, (text, value) in series.items():
            family = GaugeMetricFamily(f"router_{name}", text, labels=["model"])
            for sample in samples:
                family.add_metric([sample.model], float(value(sample)))
            yield family


def _without_created(family: Metric) -> Metric:
    kept = Metric(family.name, family.documentation, family.type)
    created = f"{family.name}_created"
    kept.samples = [sample for sample in family.samples if sample.name != created]
    return kept


def _as_vllm(family: Metric) -> Metric:
    name = VLLM_NAMES[family.name]
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {
            "model_name" if key == "model" else "engine" if key == "replica" else key: value
            for key, value in sample.labels.items()
        }
        labels.setdefault("engine", "0")
        renamed.add_sample(name + sample.name[len(family.name) :], labels, sample.value)
    return renamed
