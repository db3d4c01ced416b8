"""A model's first layer over real ranks against one: honest sums pass, lossy ones do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.children import Children
from cluster.collectives.rank_group import RankGroup
from cluster.discover import discover
from cluster.measure import meeting_place, targets
from cluster.probes import Target
from launch.models import resolve
from orchestrator.engine_config import EngineConfig
from orchestrator.first_layer import differs
from strategies.source import spec_of
from tests.tiny import make_model


def corrupted(target: Target, meeting: str, config: EngineConfig, tp: int) -> str | None:
    """One rank's part of each sum is lost on the way."""
    honest = RankGroup.all_reduce

    def losing(self: RankGroup, tensor: torch.Tensor) -> torch.Tensor:
        if target.rank == 1 and tensor.numel() > 1:  # no trial of the wires
            tensor.zero_()
        return honest(self, tensor)

    RankGroup.all_reduce = losing  # type: ignore[method-assign]
    try:
        return differs(target, meeting, config, tp)
    finally:
        RankGroup.all_reduce = honest  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with closing(Children(2, {}, print)) as started:
        yield started


@pytest.mark.parametrize(("job", "wrong"), [(differs, False), (corrupted, True)])
def test_a_split_layer_must_give_one_devices_logits(
    job: object, wrong: bool, children: Children, tmp_path: Path
) -> None:
    make_model(tmp_path, "mistral", num_hidden_layers=3, sliding_window=9)
    source = resolve(str(tmp_path))
    config = EngineConfig(source, spec_of(source), "float32", "cpu")
    meeting = meeting_place()
    args = [(target, meeting) for target in targets(discover(2, "cpu"), 2, probe_s=0.0)]
    first, second = children.each(partial(job, config=config, tp=2), args, 60)  # type: ignore[arg-type]
    assert second is None
    if wrong:
        assert first.startswith("corrupt logits: ")
        assert first.endswith(" off those of one device, and 0.001 is allowed")
    else:
        assert first is None
