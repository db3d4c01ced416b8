"""`shardwise batch run`, killed for real when half is done and run again: only what was in flight is computed twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.journal import ERRORS, OUTPUT
from tests.hosts import ROOT
from tests.tiny import make_model

LINES, SEQS, TOKENS = 300, 4, 40
START_S = 180.0


@pytest.mark.slow
def test_a_driver_killed_amid_its_batch(tmp_path: Path) -> None:
    model, path, out, job = (tmp_path / name for name in ("model", "in.jsonl", "out.jsonl", "out.job"))
    make_model(model, "llama", max_position_embeddings=512)
    with path.open("w") as file:
        for i in range(LINES):
            body = {"prompt": [3, 1, i % 100], "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    argv = [sys.executable, "-m", "launch", "batch", "run", str(model), str(path), "-o", str(out)]
    argv += ["--layout", "tp1", "--device", "cpu", "--max-model-len", "64", "--max-num-seqs", str(SEQS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    output = job / OUTPUT
    with subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as first:
        end_s = time.monotonic() + START_S
        while not output.is_file() or output.read_bytes().count(b"\n") < LINES // 2:
            assert first.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    before = output.read_bytes().count(b"\n")
    assert LINES // 2 <= before < LINES, "it was done before it was killed"
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_299","custom_id":"r29')
    second = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert f"{before} of {LINES} requests were answered before" in second.stderr
    generated = re.search(r"(\d+) tokens in", second.stderr)
    assert generated is not None
    assert int(generated[1]) == (LINES - before) * TOKENS
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(one["custom_id"] for one in answers) == Counter(f"r{i}" for i in range(LINES))
    assert {one["response"]["body"]["usage"]["completion_tokens"] for one in answers} == {TOKENS}
    assert not (job / ERRORS).read_bytes()
