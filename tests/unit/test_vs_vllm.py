"""The pure parts of the benchmark beside vLLM: what it reads from logs, puts in its table, and calls a share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.bench import roofline
from tests.bench.child import run_child
from tests.bench.vs_vllm import (
    LIMIT_S,
    dims_of,
    environment,
    median,
    parse,
    parse_result,
    roofline_lines,
    rows,
    together,
    vllm_flags,
)
from tests.unit.machines import LLAMA_8B

LOG = """INFO 11-21 10:00:01 [kv_cache_utils.py:1] GPU KV cache size: 412,345 tokens
INFO 11-21 10:00:01 [kv_cache_utils.py:1] GPU KV cache size: 412,320 tokens
RESULT {"tag": "tp2", "vllm": "0.26.0", "tp": 2, "load_s": 61.2, "ttft_ms": 16.9, "single_tok_s": 237.1}
(EngineCore pid=7) INFO shutting down
"""


def test_a_result_is_the_numbers_of_its_line_and_the_least_cache_of_the_log() -> None:
    assert parse_result(LOG) == {
        "tp": 2,
        "load_s": 61.2,
        "ttft_ms": 16.9,
        "single_tok_s": 237.1,
        "kv_tokens": 412_320,
    }
    assert parse_result('RESULT {"kv_tokens": 7, "ttft_ms": 1}\n') == {"kv_tokens": 7, "ttft_ms": 1}
    assert parse_result("Traceback (most recent call last):\nRuntimeError: no RESULT here\n") is None


def test_replicas_side_by_side() -> None:
    a = {"batch_out_tok_s": 4900.0, "kv_tokens": 400, "batch_s": 6.5, "tpot_ms": 6.0}
    b = {"batch_out_tok_s": 5100.0, "kv_tokens": 420, "batch_s": 6.7, "tpot_ms": 7.0}
    assert together([a, b]) == {"batch_out_tok_s": 10_000.0, "kv_tokens": 820, "batch_s": 6.7, "tpot_ms": 6.5}


def test_a_round_that_failed_is_left_out_of_the_median() -> None:
    assert median([{"ttft_ms": 3.0}, {}, {"ttft_ms": 5.0, "tpot_ms": 1.0}]) == {
        "ttft_ms": 4.0,
        "tpot_ms": 1.0,
    }
    assert median([{}]) == {}


def test_the_table() -> None:
    own, theirs = (
        {"ttft_ms": 15.0, "single_tok_s": 180.0, "start_s": 20.0},
        {"ttft_ms": 16.5, "single_tok_s": 150.0},
    )
    found = rows("tp1", own, theirs, with_goals=True)
    assert found == [
        ("TTFT at 512 tokens, ms", "15.0", "16.5", "1.10", "≤ 16"),
        ("single, tokens/s", "180", "150", "1.20", "≥ 178"),
        ("process start to first token, s", "20.0", "–", "", "≤ 25"),
    ]
    assert [row[2:] for row in rows("tp1", own, {}, with_goals=False)] == 3 * [("–", "", "")]


def test_a_layout_with_host_at_its_end_runs_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert environment("tp2host")["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE" not in environment("tp2")
    assert vllm_flags("tp2host", dims_of("tp2host"), "b") == [
        *("--tag", "tp2host", "--tp", "2", "--pp", "1"),
        "--no-custom-ar",
    ]
    assert vllm_flags("pp2host", dims_of("pp2host"), "b") == ["--tag", "pp2host", "--tp", "1", "--pp", "2"]
    assert vllm_flags("dp2", dims_of("dp2"), "b")[-2:] == ["--barrier", "b"]
    assert vllm_flags("tp1+fp8", dims_of("tp1+fp8"), "b")[-2:] == ["--quantization", "fp8"]


def test_least_bytes_and_flops_of_llama_8b() -> None:
    params = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 128256 * 4096
    assert roofline.decode_bytes(LLAMA_8B, "bfloat16", 0) == 2 * params
    kv = roofline.decode_bytes(LLAMA_8B, "bfloat16", 576) - 2 * params
    assert kv == 576 * 32 * 2 * 8 * 128 * 2
    one, two = (roofline.prefill_flops(LLAMA_8B, tokens) for tokens in (512, 1024))
    # Twice the tokens: twice the products, but four times the attention, and the same logits.
    attention, logits = 512 * 256 * 4 * 32 * 4096, 2 * 128256 * 4096
    assert two - 2 * one == 2 * attention - logits


def test_shares_of_the_limits_are_those_of_the_card() -> None:
    h100, h200 = (roofline.limits_of(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
    said = roofline.memory_line("decode", 15.5e9, 0.005, h100)
    assert (
        said == "decode: 15.50 GB a GPU in 5.00 ms, 3.10 TB/s: 100% of 3.10 measured, 93% of 3.35 data sheet"
    )
    said = roofline.compute_line("prefill", 7.87e12, 0.02, h100)
    assert said.endswith("394 TFLOP/s: 50% of 787 measured, 40% of 989 data sheet")
    assert roofline.memory_line("decode", 15.5e9, 0.005, h200).endswith("3.10 TB/s: 65% of 4.80 data sheet")
    unknown = roofline.limits_of("a card of tomorrow")
    assert roofline.memory_line("decode", 15.5e9, 0.005, unknown).endswith("3.10 TB/s")


def test_a_split_layer_is_read_by_two_but_a_stage_by_one() -> None:
    own = {"tpot_ms": 5.0, "ttft_ms": 16.0, "batch_prefill_s": 8.0}
    gigabytes = {}
    for layout in ("tp1", "tp2", "pp2", "dp2"):
        args = parse(["--layout", layout, "--only", "ours"])
        lines = roofline_lines(args, own)
        gigabytes[layout] = float(lines[0].split(": ")[1].split()[0])
    assert gigabytes == {"tp1": 15.09, "tp2": 7.54, "pp2": 15.09, "dp2": 15.09}


def test_a_child_that_is_done_tells_when(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('RESULT {}')"]
    text, seen_s = run_child(command, os.environ, tmp_path, 30, until="RESULT ")
    assert text == "RESULT {}\n"
    assert seen_s is not None


def test_a_child_over_its_limit_is_ended_and_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wait = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    text, seen_s = run_child([sys.executable, "-c", wait], os.environ, tmp_path, 1, until="RESULT ")
    assert (text, seen_s) == ("begun\n", None)
    assert "exit code -15, its last lines:\nbegun" in capfd.readouterr().err


def test_vllm_needs_its_places() -> None:
    with pytest.raises(SystemExit):
        parse(["--layout", "tp1"])
    assert (
        parse(["--layout", "tp1", "--only", "ours", "--patience", "2"]).limit_s["ours"] == 2 * LIMIT_S["ours"]
    )
