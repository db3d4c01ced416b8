"""The GPU's runner without its graphs, kernels interpreted on the CPU: the tokens of the plain runner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.collectives.torch_dist import RankGroup, TorchCollectives
from launch.models import resolve
from orchestrator.engine import captured as sizes_captured
from orchestrator.engine import ops
from orchestrator.engine.captured import chunk_sizes, decode_sizes
from orchestrator.engine.checkpoint import open_checkpoint
from orchestrator.engine.cuda_runner import CudaRunner
from orchestrator.engine.kernels import all as kernels
from orchestrator.engine.kernels.attention import query_rows
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.loader import load
from orchestrator.engine.model import Transformer
from orchestrator.engine.runner import Runner
from orchestrator.engine.slots import Slots
from orchestrator.engine.told import Block, Shape
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import Row
from strategies.overlap import Overlap
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.source import spec_of
from strategies.tensor import Vocabulary
from tests.interpreted import *  # noqa: F403
from tests.tiny import make_model

CPU = torch.device("cpu")
LIMITS = SchedulerConfig(
    num_blocks=24, block_size=8, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32
)
PROMPTS = [[3, 1, 2], list(range(30, 49)), [4], [9, 9, 8, 7, 6, 5, 4, 3, 2, 1, 3], [5, 6]]


@pytest.mark.parametrize("parts", [1, 2])
def test_tokens_are_the_plain_ones(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In captured sizes, of one part and of two, whatever lies across them; what fills none goes as it is."""
    make_model(tmp_path, "llama", num_hidden_layers=2)
    source = resolve(str(tmp_path))
    spec = spec_of(source)
    shard = shard_replica(spec, ParallelDims())[0]
    with torch.device("meta"):
        model = Transformer(spec)
    load(model, shard, spec, open_checkpoint(source, spec), CPU, torch.float32)
    stage = RankGroup([0], 0, None)
    collectives, vocabulary = TorchCollectives(0, 1, 1, stage, CPU), Vocabulary(spec, shard, stage)

    def made() -> tuple[KVCache, Slots]:
        slots = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size)
        return KVCache(spec, LIMITS.num_blocks, LIMITS.block_size, torch.float32, CPU), slots

    def shapes(runner: CudaRunner, tokens: int) -> list[Shape]:
        block = Block(query_rows(spec.head_dim, torch.float32, CPU), spec.heads // spec.kv_heads)
        sizes = [tokens] if parts == 1 else [tokens // 2, tokens - tokens // 2]
        return [Shape(size, 0 if i else 4, 4, 4, block) for i, size in enumerate(sizes)]

    monkeypatch.setattr(sizes_captured, "CHUNK_TOKENS", (8, 16))
    monkeypatch.setattr(sizes_captured, "SHORT_TOKENS", 0)
    monkeypatch.setattr(CudaRunner, "_parts_of", shapes)
    plain = Runner(model, *made(), shard, collectives, vocabulary)
    runner = CudaRunner(
        model, *made(), shard, collectives, vocabulary, Overlap(stage), LIMITS.max_num_batched_tokens
    )
    captured: list[int] = []
    run_chunk = runner._run_chunk
    monkeypatch.setattr(
        runner, "_run_chunk", lambda size, rows: captured.append(size) or run_chunk(size, rows)
    )
    scheduler, compared = Scheduler(LIMITS), 0
    for i, prompt in enumerate(PROMPTS):
        scheduler.add(Request(id=str(i), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=3)))
    while (step := scheduler.schedule()) is not None:
        expected = plain.run(step)
        with monkeypatch.context() as patched:
            patched.setattr(ops, "has_kernels", lambda x: True)
            patched.setattr(kernels, "MAX_ROWS", 0)  # slow to interpret, and tested by themselves
            got = runner.run(step)
        assert expected is not None
        assert got is not None
        result = expected.result()
        assert got.result().token_ids == result.token_ids
        compared += len(result.token_ids)
        scheduler.update(result)
    assert compared == 3 * len(PROMPTS)
    assert len(set(captured)) == 2


@pytest.mark.parametrize(
    ("step_tokens", "tp", "last"),
    [
        (8192, 1, [896, 1024]),
        (8192, 2, [2048, 8192]),
        (2048, 2, [1792, 2048]),
        (300, 1, [256, 300]),
        (16, 1, [16]),
    ],
)
def test_captured_sizes_go_as_far_as_launching_takes_longer(
    step_tokens: int, tp: int, last: list[int]
) -> None:
    assert chunk_sizes(step_tokens, tp)[-len(last) :] == last


def test_a_part_takes_what_it_has_room_for() -> None:
    def rows(decodes: int, prompts: int, samples: bool = True) -> list[Row]:
        counts = [1] * decodes + [3] * prompts
        return [Row(i, 5, count, samples, 0, -1) for i, count in enumerate(counts)]

    shape = Shape(tokens=100, decodes=4, prompts=2, samples=5, block=Block(16, 1))
    assert shape.takes(rows(3, 2))
    assert shape.takes(rows(4, 2, samples=False))
    assert not shape.takes(rows(4, 2))
    assert not shape.takes(rows(5, 0, samples=False))
    assert not shape.takes(rows(1, 3))
    later = Shape(
        tokens=100, decodes=0, prompts=2, samples=5, block=Block(16, 1)
    )  # whose tokens come behind a first part's
    assert later.takes(rows(1, 1))
    assert not later.takes(rows(2, 1))


def test_decode_sizes_have_every_number_of_rows() -> None:
    assert decode_sizes(300)[-3:] == [272, 288, 300]
    assert decode_sizes(3) == [1, 2, 3]
