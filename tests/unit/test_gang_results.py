"""What is said of calls that nobody answers."""

from __future__ import annotations

import pytest

from cluster.errors import GangDied
from cluster.gang import Answer, Call, Member, results


def test_who_is_silent_is_named_with_the_time_that_was_waited() -> None:
    calls = [Call(Member(i, "10.0.0.1", "n", 100 + i, 0, "log"), "Worker") for i in range(2)]
    calls[0].settle(Answer(7))
    with pytest.raises(GangDied, match=r"worker 1 \(pid 101 .* did not answer Worker\(\) in 0\.05 s"):
        results(calls, 0.05)
    calls[1].settle(Answer(8))
    assert results(calls, 0.05) == [7, 8]
