"""Prometheus metrics: vLLM's names, so that its dashboards and gateways work unchanged, and what
nobody else tells about adapters (requests, tokens, load times, tiers) under `jlora:`.

No jax. Counters of the engine and the store are read when somebody scrapes.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jlora.parts import EngineLike
from jlora.stream import Delta, Stream

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)  # fmt: skip
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
MODEL = ("model_name",)
BASE = ""
"""The `adapter` label of requests to the base model."""


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, *, engine: EngineLike, store: Any, model_name: str, version: str):
        self.version = version
        self.registry = CollectorRegistry()
        self._store = store
        self._running: dict[Stream, None] = {}
        self._reasons: dict[str, set[str]] = {}  # adapter -> how its requests have ended so far

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(name, text, MODEL, buckets=tuple(buckets), registry=self.registry)
            return made.labels(model_name)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, (*MODEL, *labels), registry=self.registry)

        self._model = model_name
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Time to first token", SECONDS)
        self._itl = Gaps("vllm:inter_token_latency_seconds", "Time between tokens", model_name)
        self.registry.register(self._itl)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token", GAPS
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Whole request", SECONDS)
        self._queue = histogram(
            "vllm:request_queue_time_seconds", "Time before the first step of a request", SECONDS
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "From the first step to the first token", SECONDS
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "From the first to the last token", SECONDS
        )
        self._prompts = histogram("vllm:request_prompt_tokens", "Prompt tokens", TOKENS)
        self._outputs = histogram("vllm:request_generation_tokens", "Generated tokens", TOKENS)
        self._n = histogram("vllm:request_params_n", "Parameter n", (1, 2, 5, 10, 20))
        self._max = histogram("vllm:request_params_max_tokens", "Parameter max_tokens", TOKENS)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens").labels(model_name)
        self._generation_tokens = counter("vllm:generation_tokens", "Generated tokens").labels(
            model_name
        )
        self._success = counter("vllm:request_success", "Ended requests", ("finished_reason",))
        self._requests = counter(
            "jlora:adapter_requests", "Ended requests by adapter", ("adapter", "finished_reason")
        )
        self._adapter_prompt = counter(
            "jlora:adapter_prompt_tokens", "Prompt tokens by adapter", ("adapter",)
        )
        self._adapter_generation = counter(
            "jlora:adapter_generation_tokens", "Generated tokens by adapter", ("adapter",)
        )
        self._loads = histogram(
            "jlora:adapter_load_seconds", "Time to read, check and stage an adapter", SECONDS
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)
        self.registry.register(Live(engine=engine, store=store, model_name=model_name))

    def started(self, stream: Stream) -> None:
        self._running[stream] = None

    def observed(self, stream: Stream, deltas: list[Delta]) -> None:
        """Latencies of what just came."""
        for delta in deltas:
            if not delta.token_ids:
                continue
            if delta.first_at is not None:
                self._ttft.observe(delta.first_at - stream.created)
            for gap in delta.gaps:
                self._itl.observe(gap)
            self._generation_tokens.inc(len(delta.token_ids))

    def ended(self, stream: Stream) -> None:
        """Count a request; a second call for the same stream counts nothing."""
        if self._running.pop(stream, stream) is not None:
            return
        now = time.monotonic()
        name = stream.adapter.label if stream.adapter is not None else BASE
        self._e2e.observe(now - stream.created)
        self._prompts.observe(stream.prompt_tokens)
        self._outputs.observe(stream.completion_tokens)
        self._n.observe(len(stream.choices) // stream.prompt_count)
        self._prompt_tokens.inc(stream.prompt_tokens)
        self._adapter_prompt.labels(self._model, name).inc(stream.prompt_tokens)
        self._adapter_generation.labels(self._model, name).inc(stream.completion_tokens)
        for choice in stream.choices:
            reason = choice.finish_reason or "abort"
            self._success.labels(self._model, reason).inc()
            self._requests.labels(self._model, name, reason).inc()
            self._reasons.setdefault(name, set()).add(reason)
            self._max.observe(choice.params.max_tokens or 0)
            if choice.first_at is None or choice.last_at is None:
                continue
            decode = choice.last_at - choice.first_at
            self._decode.observe(decode)
            if len(choice.token_ids) > 1:
                self._tpot.observe(decode / (len(choice.token_ids) - 1))
            if choice.queue_seconds is not None:
                self._queue.observe(choice.queue_seconds)
                self._prefill.observe(choice.first_at - stream.created - choice.queue_seconds)
        if name != BASE and name not in self._store:
            self.forget(name)  # it was unloaded while this request ran

    def forget(self, name: str) -> None:
        """Drop the series of an adapter that is gone, so that churn does not grow the page for ever;
        while requests of it run, the last of them does."""
        running = (s.adapter.label for s in self._running if s.adapter is not None)
        if name not in self._reasons or name in self._store or name in running:
            return
        self._adapter_prompt.remove(self._model, name)
        self._adapter_generation.remove(self._model, name)
        for reason in self._reasons.pop(name):
            self._requests.remove(self._model, name, reason)

    def page(self) -> bytes:
        """The text of GET /metrics."""
        for seconds in self._store.take_load_seconds():
            self._loads.observe(seconds)
        return generate_latest(self.registry)


class Gaps(Collector):
    """A histogram that every token is observed in: what prometheus_client's own takes for that is
    taken from the engine's thread, through the interpreter's lock. One thread observes."""

    def __init__(self, name: str, text: str, model_name: str):
        self._name, self._text, self._model = name, text, model_name
        self._counts = [0] * (len(GAPS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(GAPS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=MODEL)
        bounds = [*map(floatToGoString, GAPS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric([self._model], buckets, self._sum)
        yield family


class Live(Collector):
    """Gauges and totals that the engine and the store keep themselves."""

    def __init__(self, *, engine: EngineLike, store: Any, model_name: str):
        self._engine, self._store, self._model = engine, store, model_name

    def describe(self) -> Iterable[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in steps", stats.running),
            ("vllm:num_requests_waiting", "Requests in the queue", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1", stats.kv_usage),
        ):
            yield self._gauge(name, text, value)
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found", stats.prefix_hits),
            ("vllm:num_preemptions", "Requests that lost their pages", stats.preemptions),
        ):
            yield self._counter(name, text, value)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        names = [_names(stats.waiting_adapters), _names(stats.running_adapters)]
        info.add_metric([str(stats.max_loras), *names], time.time())
        yield info
        yield from self._adapters()

    def _adapters(self) -> Iterator[Metric]:
        totals = self._store.counters()
        yield self._counter("jlora:adapter_loads", "Adapters read from disk", totals.loads)
        yield self._counter(
            "jlora:adapter_load_failures", "Reads that failed", totals.load_failures
        )
        yield self._counter("jlora:adapter_unloads", "Adapters unloaded", totals.unloads)
        for name, text, values in (
            ("jlora:adapter_tier_hits", "Requests by the tier of their adapter", totals.hits),
            ("jlora:adapter_evictions", "Adapters pushed out of a tier", totals.evictions),
        ):
            family = CounterMetricFamily(name, text, labels=["model_name", "tier"])
            for tier, value in values.items():
                family.add_metric([self._model, tier], value)
            yield family
        yield self._gauge("jlora:adapter_host_bytes", "Host memory of adapters", totals.host_bytes)
        yield self._gauge("jlora:adapter_device_pages", "Rank pages in use", totals.device_pages)
        loaded = GaugeMetricFamily(
            "jlora:adapter_loaded", "1 for each adapter", labels=["adapter", "tier", "pinned"]
        )
        for item in self._store.adapters():
            loaded.add_metric(
                [str(item["name"]), str(item["tier"]), str(item["pinned"]).lower()], 1
            )
        yield loaded

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


def _names(adapters: Iterable[Any]) -> str:
    """Adapter names as a comma list, each once."""
    names = {item if isinstance(item, str) else item.name for item in adapters}
    return ",".join(sorted(names))
