"""What Prometheus reads: vLLM's names where they mean the same, ours beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from orchestrator.coordinator import Coordinator
from orchestrator.meter import Histogram
from orchestrator.request import FinishReason
from orchestrator.scheduler import Load


@dataclass(frozen=True, slots=True)
class LinkFact:
    """A link between two devices of the deployment, as the planner prices it."""

    first: str
    second: str
    kind: str
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while it serves."""

    model: str
    layout: str
    devices: int
    predicted: Mapping[str, float]  # by the metric's name
    links: Sequence[LinkFact] = ()


class Snapshot:
    """One reading of everything, as prometheus_client wants it: a collector."""

    def __init__(self, facts: Facts, coordinator: Coordinator, loads: Mapping[int, Load]) -> None:
        self._facts, self._coordinator, self._loads = facts, coordinator, loads
        self._meter = coordinator.meter

    def text(self) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        found: bytes = generate_latest(registry)
        return found

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()
        yield from self._ours()

    def _gauges(self) -> Iterator[Metric]:
        coordinator, limits = self._coordinator, self._coordinator.limits
        running = sum(load.running for load in self._loads.values())
        waiting = coordinator.waiting_requests + sum(load.waiting for load in self._loads.values())
        free = [load.free_blocks for load in self._loads.values()]
        used = 1 - sum(free) / (len(free) * limits.num_blocks) if free else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests in the batches of the replicas", running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a replica or in one", waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use; 1 is all of them", used)
        info = InfoMetricFamily("vllm:cache_config", "The KV cache", labels=["model_name"])
        told = {"block_size": str(limits.block_size), "num_gpu_blocks": str(limits.num_blocks)}
        info.add_metric([self._facts.model], told)
        yield info

    def _counters(self) -> Iterator[Metric]:
        meter = self._meter
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed or found", meter.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated", meter.generated_tokens)
        preempted = sum(load.preemptions for load in self._loads.values())
        hits = sum(load.prefix_hit_tokens for load in self._loads.values())
        yield self._counter("vllm:num_preemptions", "Sequences that gave up their KV blocks", preempted)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up", meter.prompt_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found", hits)
        queried = sum(load.host_queried_tokens for load in self._loads.values())
        brought = sum(load.host_hit_tokens for load in self._loads.values())
        yield self._counter("vllm:external_prefix_cache_queries", "Tokens not found on a device", queried)
        yield self._counter("vllm:external_prefix_cache_hits", "Of them, found in host memory", brought)
        done = CounterMetricFamily(
            "vllm:request_success", "Finished requests", labels=["model_name", "finished_reason"]
        )
        for reason in FinishReason:
            done.add_metric([self._facts.model, str(reason)], meter.finished[reason])
        yield done

    def _histograms(self) -> Iterator[Metric]:
        meter = self._meter
        shown = (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token", meter.ttft_s),
            ("vllm:inter_token_latency_seconds", "Between two tokens of a request", meter.gap_s),
            ("vllm:request_time_per_output_token_seconds", "A request's mean of that", meter.tpot_s),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token", meter.latency_s),
            ("vllm:request_queue_time_seconds", "Until a replica got it", meter.queue_s),
            ("vllm:request_prefill_time_seconds", "From there to the first token", meter.prefill_s),
            ("vllm:request_decode_time_seconds", "From there to the last", meter.decode_s),
            ("vllm:request_prompt_tokens", "Of a request", meter.prompt_lengths),
            ("vllm:request_generation_tokens", "Of a request", meter.output_lengths),
            ("vllm:request_params_max_tokens", "What requests ask for", meter.asked_max_tokens),
            ("vllm:request_params_n", "What requests ask for", meter.asked_n),
            ("shardwise:step_generation_tokens", "Tokens that one step of a replica gave", meter.step_tokens),
        )
        for name, says, histogram in shown:
            yield self._histogram(name, says, histogram)
        # The name that vLLM's boards used before inter_token_latency_seconds.
        yield self._histogram("vllm:time_per_output_token_seconds", "Between two tokens", meter.gap_s)

    def _ours(self) -> Iterator[Metric]:
        meter, facts = self._meter, self._facts
        refused = CounterMetricFamily("shardwise:requests_refused", "At the door", labels=["error"])
        failed = CounterMetricFamily("shardwise:requests_failed", "After it", labels=["error"])
        for family, counts in ((refused, meter.refused), (failed, meter.failed)):
            for error, count in sorted(counts.items()):
                family.add_metric([error], count)
            yield family
        tokens = CounterMetricFamily("shardwise:replica_generation_tokens", "By replica", labels=["replica"])
        alive = GaugeMetricFamily("shardwise:replica_alive", "1: it answers", labels=["replica"])
        restarts = CounterMetricFamily("shardwise:replica_restarts", "After its death", labels=["replica"])
        for number, is_alive in enumerate(self._coordinator.replicas_alive):
            tokens.add_metric([str(number)], meter.of_replica[number])
            alive.add_metric([str(number)], int(is_alive))
            restarts.add_metric([str(number)], self._coordinator.restarts.get(number, 0))
        yield tokens
        yield alive
        yield restarts
        replayed = CounterMetricFamily("shardwise:requests_replayed", "Their replica died under them")
        replayed.add_metric([], meter.replayed)
        yield replayed
        saved = sum(load.host_saved_blocks for load in self._loads.values())
        loaded = sum(load.host_loaded_blocks for load in self._loads.values())
        yield self._counter("shardwise:host_kv_blocks_out", "KV blocks copied to host memory", saved)
        yield self._counter("shardwise:host_kv_blocks_in", "KV blocks brought back from there", loaded)
        open_ = self._coordinator.open_requests
        yield self._gauge("shardwise:requests_open", "Taken and not finished", open_)
        layout = InfoMetricFamily("shardwise:layout", "What is served", labels=["model_name"])
        layout.add_metric([facts.model], {"layout": facts.layout, "devices": str(facts.devices)})
        yield layout
        for name, value in facts.predicted.items():
            gauge = GaugeMetricFamily(f"shardwise:predicted_{name}", "By the planner", labels=["layout"])
            gauge.add_metric([facts.layout], value)
            yield gauge
        yield from _links(facts.links)

    def _gauge(self, name: str, says: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, says, labels=["model_name"])
        family.add_metric([self._facts.model], value)
        return family

    def _counter(self, name: str, says: str, value: float) -> Metric:
        family = CounterMetricFamily(name, says, labels=["model_name"])
        family.add_metric([self._facts.model], value)
        return family

    def _histogram(self, name: str, says: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, says, labels=["model_name"])
        family.add_metric([self._facts.model], list(_cumulative(histogram)), histogram.total)
        return family


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, float]]:
    so_far = 0
    for bound, count in zip((*map(float, histogram.bounds), float("inf")), histogram.counts, strict=True):
        so_far += count
        yield ("+Inf" if bound == float("inf") else str(bound)), so_far


def _links(links: Iterable[LinkFact]) -> Iterator[Metric]:
    labels = ["first", "second", "kind"]
    rates = GaugeMetricFamily("shardwise:link_bytes_per_second", "Of a link, as planned with", labels=labels)
    delays = GaugeMetricFamily("shardwise:link_latency_seconds", "Of a link, as planned with", labels=labels)
    for link in links:
        named = [link.first, link.second, link.kind]
        rates.add_metric(named, link.bytes_per_s)
        delays.add_metric(named, link.latency_s)
    yield rates
    yield delays
