"""The server's own OpenAPI page, taken at its word by schemathesis: whatever it makes of that, no 5xx comes back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import PATIENCE_S, ROOT

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "30"))
LEAST_PATHS = 10


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("st") is None, reason="needs schemathesis")
def test_no_request_makes_it_fail(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.fake_server", str(tmp_path), "0"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            asked = ["st", "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing"]
            asked += [
                "--checks",
                "not_a_server_error",
                "--max-examples",
                str(EXAMPLES),
                "--no-color",
                "--seed",
                "1",
            ]
            asked += ["--request-timeout", "30", "--continue-on-failure"]
            done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
            print(done.stdout[-3000:])
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
    tested = re.search(r"(\d+) selected / (\d+) total", done.stdout)
    assert tested is not None, done.stdout
    assert int(tested[1]) == int(tested[2]) >= LEAST_PATHS
