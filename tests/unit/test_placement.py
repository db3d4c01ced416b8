"""A refused placement says need, have, who holds it and the way out."""

from __future__ import annotations

from cluster.placement import refusal


def test_too_few_in_all():
    assert str(refusal(8, "GPU", {"10.0.0.1": 2, "10.0.0.2": 4}, 5, {"Trainer of process 7": 1})) == (
        "8 GPU needed; the cluster has 2 on 10.0.0.1, 4 on 10.0.0.2; free: 5; "
        "held by Trainer of process 7 (1). Use at most 6, or add nodes."
    )


def test_some_held_by_others():
    message = str(refusal(2, "GPU", {"10.0.0.1": 2}, 1, {"a": 1, "idle": 0}))
    assert message.endswith("free: 1; held by a (1). Use at most 1, or end who holds the others.")


def test_all_held_by_others():
    assert str(refusal(1, "GPU", {"n": 2}, 0, {"a": 2})).endswith("Wait for them, or end who holds them.")


def test_a_cluster_without_any():
    message = str(refusal(1, "GPU", {"n": 0}, 0, {}))
    assert (
        message == "1 GPU needed; the cluster has none; free: 0; held by nobody. Add nodes that have a GPU."
    )
