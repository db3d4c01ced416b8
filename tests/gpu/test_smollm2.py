"""SmolLM2 on GPUs under Ray and NCCL: transformers' greedy tokens in float32, and bf16 logits no worse than its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from launch.progress import Progress
from launch.start import Devices, cluster, deployment
from launch.trial import Trial, Truth, forced_tokens, measure_truth, run_trials
from orchestrator.request import SamplingParams
from strategies.plan import Candidate, ParallelDims
from strategies.spec import Workload
from tests.oracle import SmolLM2Oracle
from tests.serving import answers, options

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
LAYOUTS = ["tp1", "tp2", "pp2", "dp2"]
FLOAT32 = options("smollm2", device="cuda", max_model_len=512, max_num_batched_tokens=64, block_size=16)


@pytest.fixture(scope="module")
def devices() -> Iterator[Devices]:
    with cluster(FLOAT32, torch.cuda.device_count(), Progress()) as found:
        yield found


@pytest.fixture(scope="module")
def oracle() -> SmolLM2Oracle:
    torch.backends.cuda.matmul.allow_tf32 = False
    return SmolLM2Oracle("cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_tokens_and_logits(layout: str, devices: Devices, oracle: SmolLM2Oracle) -> None:
    score = forced_tokens(FLOAT32.spec.vocab)
    with deployment(devices, ParallelDims.parse(layout), FLOAT32, Progress(), score=score) as found:
        sampling = SamplingParams(max_tokens=len(oracle.tokens[0]), ignore_eos=True)
        done = answers(found, FLOAT32, [(prompt, sampling) for prompt in oracle.prompts])
        ours = torch.from_numpy(np.frombuffer(found.scored, np.float32).reshape(len(score), -1).copy())
    assert [c.token_ids for c in done] == oracle.tokens
    with torch.no_grad():
        expected = oracle.model(torch.tensor([score], device="cuda")).logits[0].cpu()
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_bfloat16_outputs_are_equal_within_one_process_own_error(devices: Devices) -> None:
    from launch.predict import this_machine

    asked = options("smollm2", device="cuda", dtype="bfloat16", max_num_batched_tokens=64, block_size=16)
    topology = this_machine(asked)
    layouts = [ParallelDims.parse(name) for name in LAYOUTS]
    truth = measure_truth(devices, asked, layouts, topology, Progress())
    assert isinstance(truth, Truth)
    assert 0 < truth.own_error < 0.1
    found: list[Trial] = []
    load = Workload(32, 16, 4)
    for candidate in (Candidate(dims, reason=None, estimate=None) for dims in layouts):
        run_trials(
            devices,
            candidate,
            asked,
            [load],
            topology,
            truth,
            Progress(),
            lambda _, trial: found.append(trial),
        )
    assert len(found) == len(LAYOUTS)
    for trial in found:
        assert trial.forced_error is not None
        assert trial.allowed_error is not None
        assert trial.forced_error <= trial.allowed_error
