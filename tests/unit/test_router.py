"""The choice of a replica: least left to do, then fewest requests, then the first."""

from __future__ import annotations

import pytest

from orchestrator.router import Outstanding, choose


@pytest.mark.parametrize(
    ("replicas", "chosen"),
    [
        ([Outstanding(3, 0, 0)], 3),
        ([Outstanding(0, 1, 900), Outstanding(1, 5, 100)], 1),
        ([Outstanding(0, 2, 100), Outstanding(1, 1, 100)], 1),
        ([Outstanding(1, 1, 100), Outstanding(0, 1, 100)], 0),
    ],
)
def test_least_outstanding_work(replicas: list[Outstanding], chosen: int) -> None:
    assert choose(replicas) == chosen
