"""`shardwise bench`: what it counts, when it asks, and a real server under its load."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from launch import compare_against
from launch.__main__ import main
from launch.bench_figures import Limits, lines, percentile, summarise
from launch.bench_load import Answer, Prompt, arrivals, base_of, closed_loop, open_loop, random_prompts
from launch.progress import Progress
from launch.trial import Trial
from strategies.spec import Workload
from tests.hosts import ROOT

# --- figures ------------------------------------------------------------------------------------------------

ANSWERS = [
    Answer(0.0, 0.1, (0.02, 0.04), 0.16, prompt_tokens=10, output_tokens=3),
    Answer(0.05, 0.3, (0.01, 0.01), 0.32, prompt_tokens=10, output_tokens=3),
    Answer(2.0, 0.2, (), 0.2, prompt_tokens=10, output_tokens=1),
    Answer(0.1, error="status 500"),
]


def test_figures_are_those_of_the_answers_that_came() -> None:
    made = summarise(ANSWERS, 2.2, Limits())
    assert (made["completed"], made["failed"], made["request_goodput"]) == (3, 1, None)
    assert (made["total_input_tokens"], made["total_output_tokens"]) == (30, 7)
    assert made["request_throughput"] == pytest.approx(3 / 2.2)
    assert made["output_throughput"] == pytest.approx(7 / 2.2)
    assert made["total_token_throughput"] == pytest.approx(37 / 2.2)
    assert made["mean_ttft_ms"] == pytest.approx(200)
    assert made["median_ttft_ms"] == pytest.approx(200)
    assert made["mean_tpot_ms"] == pytest.approx((30 + 10) / 2)  # an answer of one token has none
    assert made["mean_itl_ms"] == pytest.approx(20)
    assert made["p99_e2el_ms"] == pytest.approx(np.percentile([160, 320, 200], 99))
    assert made["max_concurrent_requests"] == 2
    assert made["max_output_tokens_per_s"] == 6


def test_goodput_counts_what_keeps_both_limits() -> None:
    def good(**limits: float) -> object:
        return summarise(ANSWERS, 1.0, Limits(**limits))["request_goodput"]

    assert good(ttft_ms=250) == 2
    assert good(tpot_ms=20) == 2
    assert good(ttft_ms=150, tpot_ms=20) == 0


def test_the_table_has_vllms_lines() -> None:
    told = list(lines({**summarise(ANSWERS, 2.2, Limits()), "max_concurrency": 4}))
    assert told[0] == "============ Serving Benchmark Result ============"
    assert "Request throughput (req/s):              1.36      " in told
    assert "P99 TTFT (ms):                           298.00    " in told
    assert not any("goodput" in line for line in told)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_nothing_answered_has_figures_of_nothing() -> None:
    made = summarise([ANSWERS[-1]], 1.0, Limits())
    assert (made["completed"], made["mean_ttft_ms"], made["p99_itl_ms"]) == (0, 0.0, 0.0)


# --- loads --------------------------------------------------------------------------------------------------


class FakeEndpoint:
    """Answers after a time, and remembers how many it had at once."""

    def __init__(self, seconds: float = 0.0, error: str | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.now = self.most = 0
        self.asked: list[tuple[float, Prompt, int]] = []

    async def ask(self, prompt: Prompt, output_tokens: int) -> Answer:
        start_s = time.perf_counter()
        self.asked.append((start_s, prompt, output_tokens))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return Answer(start_s, self.seconds, (), self.seconds, 1, output_tokens, self.error)


def prompts(count: int) -> list[Prompt]:
    return random_prompts(count, 8, vocab=100, seed="x", as_text=False)


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    endpoint, told = FakeEndpoint(0.002), []
    done = asyncio.run(closed_loop(endpoint, prompts(20), 5, 4, told.append))
    assert endpoint.most == 4
    assert len(done) == len(told) == 20
    assert len({tuple(p.token_ids or ()) for _, p, _ in endpoint.asked}) == 20


def test_an_open_loop_asks_in_its_own_time() -> None:
    waits_s = [0.0, 0.03, 0.0, 0.03]
    endpoint = FakeEndpoint(1.0)

    async def asked_in_time() -> None:
        load = asyncio.create_task(open_loop(endpoint, prompts(4), 5, waits_s, lambda _: None))
        await asyncio.sleep(0.5)  # long before the first answer
        assert len(endpoint.asked) == 4
        load.cancel()

    asyncio.run(asked_in_time())
    times = [at for at, _, _ in endpoint.asked]
    assert all(b - a >= wait - 0.005 for (a, b), wait in zip(pairwise(times), waits_s[1:], strict=True))


def test_an_open_loop_can_be_bounded() -> None:
    endpoint = FakeEndpoint(0.005)
    asyncio.run(open_loop(endpoint, prompts(12), 5, [0.0] * 12, lambda _: None, at_once=3))
    assert endpoint.most == 3


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_their_rate_and_their_spread(burstiness: float) -> None:
    waits_s = arrivals(20_000, 50.0, burstiness, "a")[1:]
    assert np.mean(waits_s) == pytest.approx(1 / 50, rel=0.05)
    assert np.var(waits_s) / np.mean(waits_s) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_prompts_are_equal_for_a_seed_and_as_long_as_asked() -> None:
    assert prompts(3) == prompts(3)
    (text,) = random_prompts(1, 8, vocab=100, seed="x", as_text=True)
    assert text.token_ids is None and len(text.text.split()) == 8


def test_addresses_are_taken_with_and_without_v1() -> None:
    assert base_of("http://h:1/") == base_of("http://h:1/v1") == "http://h:1/v1"
    with pytest.raises(UserError, match="no address"):
        base_of("localhost:8000")


def test_an_endpoint_beside_is_put_under_the_same_loads() -> None:
    trials: dict[int, Trial] = {}

    def keep(load: Workload, trial: Trial) -> None:
        trials[load.concurrency] = trial

    loads = [Workload(prompt_tokens=8, output_tokens=5, concurrency=n) for n in (1, 3)]
    endpoint = FakeEndpoint(0.01)
    asyncio.run(compare_against.run(endpoint, "http://x", loads, 100, Progress(quiet=True), keep))
    assert endpoint.most == 3
    measured = trials[3].measured
    assert measured is not None
    assert measured.ttft_s == pytest.approx(0.01, abs=1e-6)
    assert 0 < measured.output_tokens_per_s < 3 * 5 / 0.01
    with pytest.raises(UserError, match="it must take token ids"):
        asyncio.run(
            compare_against.run(
                FakeEndpoint(error="status 400"), "http://x", loads, 100, Progress(quiet=True), keep
            )
        )


# --- a real server ------------------------------------------------------------------------------------------

STEP_S = 0.01


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ours, with a replica that answers "Hello" and its end: six tokens, one a step."""
    command = [sys.executable, "-m", "tests.fake_server", str(tmp_path_factory.mktemp("server")), str(STEP_S)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def bench(url: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    sizes = ["--prompt-tokens", "20", "--output-tokens", "5", "--vocab", "250"]
    assert main(["bench", url, *sizes, "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_closed_loop_on_a_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = bench(url, capsys, "--requests", "24", "--concurrency", "4")
    assert (made["completed"], made["failed"], made["max_concurrency"]) == (24, 0, 4)
    assert (made["total_input_tokens"], made["total_output_tokens"]) == (24 * 20, 24 * 5)
    assert made["max_concurrent_requests"] == 4
    assert made["model_id"] == "bytes" and made["request_rate"] == "inf"
    # Tokens come one by one, also on a connection's second answer: a step each, not all at the end.
    assert made["median_itl_ms"] == pytest.approx(STEP_S * 1e3, rel=0.5)
    assert made["mean_tpot_ms"] >= STEP_S * 1e3 * 0.9
    assert made["mean_ttft_ms"] < made["mean_e2el_ms"] - 3 * STEP_S * 1e3
    assert made["request_throughput"] == pytest.approx(24 / made["duration"])


def test_a_rate_on_a_server_and_chat(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the flags of `vllm bench serve`."""
    load = ("--num-prompts", "20", "--random-input-len", "7", "--random-output-len", "4")
    made = bench(url, capsys, *load, "--request-rate", "100", "--max-ttft-ms", "10000")
    assert made["completed"] == 20 and made["max_concurrency"] is None
    assert (made["total_input_tokens"], made["total_output_tokens"]) == (20 * 7, 20 * 4)
    assert made["duration"] >= sum(arrivals(20, 100.0, 1.0, "0"))
    assert made["request_goodput"] == made["request_throughput"]
    assert bench(url, capsys, "--requests", "3", "--chat")["total_output_tokens"] == 15


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--requests", "0"], "--requests is 0; it must be at least 1"),
        (["--request-rate", "nan"], "--request-rate is nan; it must be above 0"),
        (["--model", "other"], "serves bytes, alias, not other|serves bytes, not other"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: No such file or directory; give a file"),
        (["--vocab", "100000"], "all .* requests failed: status 400: .*outside the vocabulary"),
    ],
)
def test_mistakes_are_told_in_one_line(
    url: str, more: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", url, "--prompt-tokens", "20", "--output-tokens", "5", *more]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(says, err.splitlines()[-1]), err


def test_where_nobody_listens_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["bench", f"http://127.0.0.1:{port}"]) == 2
    assert "does not answer" in capsys.readouterr().err
