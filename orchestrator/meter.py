"""What the coordinator counts as it goes: plain numbers, read by whoever shows them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence

from orchestrator.request import FinishReason, SamplingParams

_FINISHES = 64  # the newest, from which the rate is taken

# vLLM's buckets (vllm/v1/metrics/loggers.py), so that boards and alerts made for it fit.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
CHOICES = (1, 2, 5, 10, 20)


class Histogram:
    """Counts by bucket; cheap enough for every token."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Meter:
    def __init__(self) -> None:
        self.prompt_tokens = self.generated_tokens = 0
        self.finished: Counter[FinishReason] = Counter()
        self.refused: Counter[str] = Counter()  # by the error's class
        self.failed: Counter[str] = Counter()
        self.of_replica: Counter[int] = Counter()  # generated tokens
        self.replayed = 0  # requests whose replica died under them, each time
        self.ttft_s = Histogram(TTFT_S)
        self.gap_s = Histogram(GAP_S)
        self.queue_s, self.prefill_s = Histogram(REQUEST_S), Histogram(REQUEST_S)
        self.decode_s, self.latency_s = Histogram(REQUEST_S), Histogram(REQUEST_S)
        self.tpot_s = Histogram(GAP_S)
        self.step_tokens = Histogram(TOKENS)
        self.prompt_lengths, self.output_lengths = Histogram(TOKENS), Histogram(TOKENS)
        self.asked_max_tokens = Histogram(TOKENS)
        self.asked_n = Histogram(CHOICES)
        self._finishes: deque[float] = deque(maxlen=_FINISHES)  # when

    def ask(self, sampling: SamplingParams) -> None:
        self.asked_n.observe(sampling.n)
        self.asked_max_tokens.observe(sampling.max_tokens)

    def first_token(self, prompt_tokens: int, queue_s: float, ttft_s: float) -> None:
        self.prompt_tokens += prompt_tokens
        self.queue_s.observe(queue_s)
        self.prefill_s.observe(ttft_s - queue_s)
        self.ttft_s.observe(ttft_s)

    def step(self, replica: int, tokens: int) -> None:
        self.generated_tokens += tokens
        self.of_replica[replica] += tokens
        self.step_tokens.observe(tokens)

    def finish(
        self,
        reason: FinishReason,
        prompt_tokens: int,
        output_tokens: int,
        ttft_s: float,
        latency_s: float,
        now_s: float,
    ) -> None:
        self.finished[reason] += 1
        self.prompt_lengths.observe(prompt_tokens)
        self.output_lengths.observe(output_tokens)
        self.latency_s.observe(latency_s)
        self.decode_s.observe(latency_s - ttft_s)
        if output_tokens > 1:
            self.tpot_s.observe((latency_s - ttft_s) / (output_tokens - 1))
        self._finishes.append(now_s)

    def seconds_for(self, requests: int, now_s: float) -> float | None:
        """How long so many requests will take, at the rate of the newest; None before there is a rate."""
        if len(self._finishes) < 2:
            return None
        return requests * (now_s - self._finishes[0]) / len(self._finishes)
