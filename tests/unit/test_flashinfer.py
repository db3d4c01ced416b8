"""What FlashInfer is told of a step, by a stand-in that reads it as FlashInfer does; and why it may not serve."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import compile_flashinfer
from orchestrator.engine import flashinfer_attention, prefill_choice
from orchestrator.engine.flashinfer_attention import FlashInferPrefill, Unusable
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.paged_attention import DeviceSlots, PagedContext, batch_of
from orchestrator.engine.rope import Rope
from orchestrator.engine.slots import Slots
from orchestrator.request import SamplingParams
from orchestrator.step import Admit, Row, Step
from strategies.spec import ModelSpec
from tests.interpreted import *  # noqa: F403
from tests.unit.machines import LLAMA_8B

CPU, HALF = torch.device("cpu"), torch.float16
BLOCK = 4


class Wrapper:
    """FlashInfer's, as its documentation has it: in float32, one query after another."""

    wrong = 0.0  # added to every result
    made: list[Wrapper]

    def __init__(self, workspace: Tensor, kv_layout: str, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD" and backend == "fa2"
        Wrapper.made.append(self)

    def plan(self, *arrays: Tensor, **asked: Any) -> None:
        assert all(array.dtype == torch.int32 and not array.is_cuda for array in arrays)
        self.offsets, self.page_offsets, self.pages, self.last = (array.tolist() for array in arrays)
        self.asked = asked

    def run(self, q_THD: Tensor, cache: tuple[Tensor, Tensor], out: Tensor, enable_pdl: bool) -> None:
        asked = self.asked
        assert not enable_pdl
        assert q_THD.shape == (self.offsets[-1], asked["num_qo_heads"], asked["head_dim_qk"])
        assert cache[0].shape[1:] == (asked["page_size"], asked["num_kv_heads"], asked["head_dim_qk"])
        assert asked["causal"] and {q_THD.dtype, out.dtype} == {asked["q_data_type"], asked["kv_data_type"]}
        for row, last in enumerate(self.last):
            pages = self.pages[self.page_offsets[row] : self.page_offsets[row + 1]]
            length = (len(pages) - 1) * asked["page_size"] + last
            k_LHD, v_LHD = (
                x[pages].flatten(0, 1)[:length].float().repeat_interleave(q_THD.shape[1] // x.shape[2], 1)
                for x in cache
            )
            begin, end = self.offsets[row], self.offsets[row + 1]
            for token in range(begin, end):
                position = length - (end - token)
                first = 0 if asked["window_left"] < 0 else max(0, position - asked["window_left"])
                seen = slice(first, position + 1)
                scores_HL = torch.einsum("hd,lhd->hl", q_THD[token].float(), k_LHD[seen]) * asked["sm_scale"]
                out[token] = torch.einsum("hl,lhd->hd", scores_HL.softmax(-1), v_LHD[seen]) + self.wrong


class Event:
    """CUDA's, of a device that has always just finished."""

    waits = 0

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None:
        Event.waits += 1


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installed, for a GPU that is not Hopper, and compiled."""
    module: Any = ModuleType("flashinfer")
    module.__spec__, module.__version__ = ModuleSpec("flashinfer", None), "0.6.14"
    module.utils = SimpleNamespace(determine_attention_backend=lambda *asked: "fa2")
    module.asked = []

    def described(*asked: Any) -> Any:
        module.asked.append(asked)
        return SimpleNamespace(is_compiled=module.compiled, build=build)

    def build(verbose: bool) -> None:
        module.built += 1

    module.compiled, module.built = True, 0
    module.jit = SimpleNamespace(gen_batch_prefill_module=described)
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setattr(Wrapper, "made", [], raising=False)
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


def small_spec(**changes: Any) -> ModelSpec:
    small = replace(LLAMA_8B, layers=2, heads=6, kv_heads=2, head_dim=64, max_positions=16)
    return replace(small, **changes)


ROWS = [  # a decode leads; then a whole prompt, one on top of 9 cached tokens, and one that fills its last block
    Row(slot=2, start=5, count=1, samples=True, token_id=1, new_block=-1),
    Row(slot=0, start=0, count=7, samples=True, token_id=-1, new_block=-1),
    Row(slot=3, start=9, count=2, samples=False, token_id=-1, new_block=-1),
    Row(slot=1, start=6, count=6, samples=True, token_id=-1, new_block=-1),
]


def admitted() -> list[Admit]:
    """Blocks in no order, and more of them than the step reaches."""
    blocks = {0: [9, 2, 14], 1: [7, 0, 3], 2: [11, 5], 3: [13, 1, 6, 4]}
    return [
        Admit(slot, list(range(len(b) * BLOCK)), len(b) * BLOCK, b, SamplingParams(), [])
        for slot, b in blocks.items()
    ]


def filled(spec: ModelSpec) -> tuple[Slots, DeviceSlots, KVCache]:
    slots, cache = Slots(4, 16, BLOCK), KVCache(spec, 15, BLOCK, HALF, CPU)
    on_device = DeviceSlots(4, 16, cache)
    slots.remember(Step(0, admitted(), []))
    on_device.admit(admitted())
    for rows in (*cache.keys, *cache.values):
        rows.normal_()
    return slots, on_device, cache


def test_a_plan_tells_each_rows_tokens_and_pages(flashinfer: Any) -> None:
    slots, _, _ = filled(small_spec())
    FlashInferPrefill(small_spec(), HALF, CPU).plan(ROWS[1:], slots)
    (wrapper,) = [made for made in Wrapper.made if hasattr(made, "asked")]
    assert wrapper.offsets == [0, 7, 9, 15]
    assert wrapper.page_offsets == [0, 2, 5, 8]
    assert wrapper.pages == [9, 2, 13, 1, 6, 7, 0, 3]
    assert wrapper.last == [3, 3, 4]
    assert wrapper.asked["seq_lens"].tolist() == [7, 11, 12]


@pytest.mark.parametrize("windows", [(), (5, None)])
def test_prompts_give_what_triton_gives(flashinfer: Any, windows: tuple[int | None, ...]) -> None:
    spec = small_spec(windows=windows)
    slots, on_device, cache = filled(spec)
    rope = Rope(spec.rope, spec.head_dim, spec.max_positions)
    plain = PagedContext(cache, on_device, batch_of(ROWS, slots, CPU), spec, rope)
    planned = batch_of(ROWS, slots, CPU, FlashInferPrefill(spec, HALF, CPU))
    other = PagedContext(cache, on_device, planned, spec, rope)
    q_THD = torch.randn((15, spec.heads, spec.head_dim), dtype=HALF)
    for layer in range(spec.layers):
        expected_THD, got_THD = torch.empty_like(q_THD), torch.full_like(q_THD, torch.nan)
        plain.prefill(layer, q_THD, expected_THD)
        other.prefill(layer, q_THD, got_THD)
        torch.testing.assert_close(got_THD, expected_THD, rtol=2e-3, atol=2e-3)


def test_steps_that_only_decode_are_not_planned(flashinfer: Any) -> None:
    slots, _, _ = filled(small_spec())
    batch_of(ROWS[:1], slots, CPU, FlashInferPrefill(small_spec(), HALF, CPU))
    assert not any(hasattr(made, "asked") for made in Wrapper.made)


def test_plans_of_two_steps_stand_and_the_next_waits_until_the_oldest_has_left_its_buffer(
    flashinfer: Any,
) -> None:
    slots, _, _ = filled(small_spec())
    prefill = FlashInferPrefill(small_spec(), HALF, CPU)
    plans = [prefill.plan(ROWS[1:], slots) for _ in range(4)]
    assert Event.waits == 0
    assert len({id(plan) for plan in plans}) == 4
    assert prefill.plan(ROWS[2:], slots) is plans[0]
    assert Event.waits == 1


def test_what_is_not_compiled_is_not_used(flashinfer: Any) -> None:
    flashinfer.compiled = False
    with pytest.raises(Unusable, match=r"not compiled: .* launch\.compile_flashinfer float16 64 --windowed$"):
        FlashInferPrefill(small_spec(windows=(5, 5)), HALF, CPU)
    assert flashinfer.asked == [("fa2", HALF, HALF, HALF, torch.int32, 64, 64, 0, True, False, False)]


def test_the_command_that_it_names_compiles_what_was_missing(
    flashinfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashinfer.compiled = False
    with pytest.raises(Unusable) as raised:
        FlashInferPrefill(small_spec(windows=(5, 5)), HALF, CPU)
    _, _, command = str(raised.value).partition("run python -m ")
    monkeypatch.setattr(sys, "argv", command.split())
    assert compile_flashinfer.main() == 0
    missing, built = flashinfer.asked
    assert missing == built and flashinfer.built == 1


@pytest.mark.parametrize(
    ("head_dim", "dtype", "says"),
    [(80, HALF, "no prefill of heads of 80"), (64, torch.float32, "no prefill of float32")],
)
def test_what_it_has_no_kernels_for(flashinfer: Any, head_dim: int, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(Unusable, match=says):
        FlashInferPrefill(small_spec(head_dim=head_dim), dtype, CPU)


def test_it_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_attention, "find_spec", lambda name: None)
    choice = prefill_choice.choose(model_of(small_spec()), 64, BLOCK, HALF, CPU)
    assert (choice.prefill, choice.path, choice.reason) == (None, "Triton", "FlashInfer is not installed")


def test_an_installation_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flashinfer").mkdir()
    lines = "\\nlibcudart.so.13: cannot open shared object file\\nand more"
    (tmp_path / "flashinfer" / "__init__.py").write_text(f"raise ImportError('{lines}')\n")
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Unusable) as raised:
        FlashInferPrefill(small_spec(), HALF, CPU)
    assert str(raised.value) == (
        "FlashInfer does not import: libcudart.so.13: cannot open shared object file"
    )


def model_of(spec: ModelSpec) -> Transformer:
    with torch.device("meta"):
        return Transformer(spec)


@pytest.mark.parametrize(("flashinfer_ms", "wins"), [(1.0, True), (3.0, False)])
def test_the_faster_serves(
    flashinfer: Any, monkeypatch: pytest.MonkeyPatch, flashinfer_ms: float, wins: bool
) -> None:
    times = iter([2.0, flashinfer_ms])

    def timed(call: Any) -> float:
        call()
        return next(times)

    monkeypatch.setattr(prefill_choice, "_median_ms", timed)
    choice = prefill_choice.choose(model_of(small_spec()), 9, BLOCK, HALF, CPU)
    assert (choice.prefill is not None) == wins
    assert choice.path.startswith("FlashInfer 0.6.14" if wins else "Triton")
    assert (
        choice.reason == f"a layer of 9 tokens takes FlashInfer 0.6.14 {flashinfer_ms:.3f} ms, Triton 2.000"
    )


def test_a_wrong_result_never_serves(flashinfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrapper, "wrong", 0.1)
    monkeypatch.setattr(prefill_choice, "_median_ms", lambda call: call() or 1.0)
    choice = prefill_choice.choose(model_of(small_spec()), 9, BLOCK, HALF, CPU)
    assert choice.prefill is None and "off, and 0.02 is allowed" in choice.reason


def test_a_description_that_fails(flashinfer: Any) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("[Errno 13] Permission denied: '/root/.cache'")

    flashinfer.jit.gen_batch_prefill_module = refuse
    choice = prefill_choice.choose(model_of(small_spec()), 9, BLOCK, HALF, CPU)
    assert (choice.prefill, choice.path) == (None, "Triton")
    assert choice.reason == "FlashInfer fails: [Errno 13] Permission denied: '/root/.cache'"


def test_a_library_that_fails_never_serves(flashinfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nno kernel image is available\n at …")

    monkeypatch.setattr(Wrapper, "plan", refuse)
    monkeypatch.setattr(prefill_choice, "_median_ms", lambda call: call() or 1.0)
    choice = prefill_choice.choose(model_of(small_spec()), 9, BLOCK, HALF, CPU)
    assert (choice.path, choice.reason) == (
        "Triton",
        "FlashInfer 0.6.14 fails: no kernel image is available",
    )
