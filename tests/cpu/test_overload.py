"""Ten times what a server can do: it refuses at once, keeps its promise to those that it took, and does not grow."""

from __future__ import annotations

import os
import resource

import pytest

from tests.bench.http_bench import FEW, FEW_STEP_S, over_http, overload

SECONDS = float(os.environ.get("OVERLOAD_S", "30"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_ten_times_capacity() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, most), most))
    found = over_http(
        "", FEW_STEP_S, None, lambda port, _, pid: overload(port, pid, SECONDS, FEW_STEP_S), FEW
    )
    found = {name.removeprefix(": "): value for name, value in found.items()}
    print({name: round(value, 1) for name, value in found.items()})
    assert found["refused while the queue was just full"] == 0
    assert found["asked/s"] > 5 * found["taken/s"] > 0
    assert found["429 p99 ms"] < 50
    assert found["their ratio"] <= 1.5
    before, after = (found[f"memory of the server {when}, MB"] for when in ("before", "after"))
    assert after < before + 8
