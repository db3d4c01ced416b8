"""Layers that come from host memory: which, where to and when, on a CPU with the same two buffers as a GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.errors import BadLayout, UserError
from cluster.gang import Answer, Call, Gang, Member
from launch.disk_limit import check_disks, limit, open_reads, streamed_bytes, tell_disk
from launch.memory import capped
from launch.options import EngineOptions
from launch.placed import Placed
from launch.progress import Progress
from orchestrator.engine import deepspeed_io
from orchestrator.engine.deepspeed_io import AsyncReads
from orchestrator.engine.disk import DiskLayers, LayerFile
from orchestrator.engine.memory import capped_free
from orchestrator.engine.offload import Stream, resident_bytes, spots, stream
from orchestrator.engine.residence import DiskRoom, Residence
from strategies.cost_memory import CAP_SLACK, CONTEXT_BYTES, GAP_BYTES
from strategies.offload import BUFFERS, Streaming, check_host, resident_layers
from strategies.overlap import Overlap
from strategies.plan import Layout
from strategies.planner import plan
from strategies.read_spec import builtin
from strategies.source import ModelSource, SourceKind
from strategies.spec import Workload
from tests.unit.machines import box
from tests.unit.test_overlap import TwoRanks

CPU = torch.device("cpu")


class Stack(nn.Module):
    """Layers of unlike weights; `width` of some may differ, as in checkpoints that keep some layers in full."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 5 + i % 2), nn.Tanh(), nn.Linear(5 + i % 2, 7)) for i in range(layers)
        )
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@given(st.integers(1, 100), st.data())
def test_streamed_layers_lie_evenly_and_end_with_the_last(layers: int, data: st.DataObject) -> None:
    resident = data.draw(st.integers(0, layers - 1))
    found = Streaming(layers, resident).streamed
    assert len(found) == layers - resident
    assert found[-1] == layers - 1
    gaps = {b - a for a, b in zip((-1, *found), found, strict=False)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 40))
def test_a_step_ends_with_the_buffers_as_it_began(count: int) -> None:
    streaming = Streaming(count, 0)
    held = {buffer: buffer for buffer in range(streaming.buffers)}
    for position in range(count):
        buffer = streaming.buffer_of(position)
        assert held[buffer] == position
        held[buffer] = streaming.after(position)
        assert streaming.buffer_of(held[buffer]) == buffer
    assert held == {buffer: buffer for buffer in range(streaming.buffers)}


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("resident", [0, 1, 2, 3])
def test_outputs_are_the_very_same_at_every_step(layers: int, resident: int) -> None:
    whole, streamed = Stack(layers), Stack(layers)
    found = stream(streamed, Streaming(layers, min(layers, resident)), CPU)
    assert (found is None) == (resident >= layers)
    for step in range(3):
        x = torch.full((2, 7), 0.1 * step + 0.1)
        assert torch.equal(streamed(x), whole(x))


class Extension:
    """DeepSpeed's, as far as it is asked: handles that read a file by its name."""

    def __init__(self, *, fails: bool = False) -> None:
        self.reads: list[tuple[int, int]] = []
        self._fails = fails

    def aio_handle(self, *sizes: object) -> Extension:
        assert sizes == (2**20, 128, False, True, 1)
        return self

    def new_cpu_locked_tensor(self, n_bytes: int, like: Tensor) -> Tensor:
        return torch.empty(n_bytes, dtype=like.dtype)

    def sync_pread(self, to: Tensor, path: str, offset: int) -> int:
        self.reads.append((offset, len(to)))
        with open(path, "rb") as file:
            file.seek(offset)
            return -1 if self._fails else int(file.readinto(to.numpy().data) == len(to))


def test_deepspeeds_reader_that_fails_is_an_error_and_not_an_answer(tmp_path: Path) -> None:
    file = LayerFile(tmp_path, [{}, {}, {}], [4096, 4096, 4096])
    file.finish()
    with pytest.raises(OSError, match="asynchronous I/O did not read 4096 bytes of layer 0"):
        DiskLayers(file, [0, 1, 2], on_gpu=False, reads=AsyncReads(Extension(fails=True), file, on_gpu=False))


def test_where_deepspeeds_cannot_be_opened_it_is_said_who_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_headers = SimpleNamespace(is_compatible=lambda verbose: False)
    modules = {
        "deepspeed.ops.op_builder": SimpleNamespace(AsyncIOBuilder=lambda: without_headers),
        "deepspeed.git_version_info": SimpleNamespace(installed_ops={}),
    }
    monkeypatch.setattr(deepspeed_io, "import_module", modules.__getitem__)
    extension, why = deepspeed_io.opened.__wrapped__()
    assert extension is None and why == "libaio's headers are missing; apt install libaio-dev"
    gang = Nodes()
    gang.answers["open_reads"] = why
    open_reads([Placed(cast(Gang, gang), (0, 1, 2))], "tp3+offload", Progress())
    said = capsys.readouterr().err
    assert "tp3+offload: threads read in place of DeepSpeed's asynchronous I/O: libaio's headers" in said
    assert said.count("threads read") == 1
    gang.answers["open_reads"] = ""
    open_reads([Placed(cast(Gang, gang), (0, 1, 2))], "tp3+offload", Progress())
    assert capsys.readouterr().err == ""


def test_the_lock_of_a_build_that_was_killed_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[bool] = []

    def load(verbose: bool) -> Extension:
        built.append(any((tmp_path / part / "lock").exists() for part in ("async_io", "pin_memory")))
        return Extension()

    def folder(part: str, verbose: bool) -> str:
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "lock").write_text("")
        return str(tmp_path / part)

    builder = SimpleNamespace(is_compatible=lambda verbose: True, load=load)
    modules = {
        "deepspeed.ops.op_builder": SimpleNamespace(AsyncIOBuilder=lambda: builder),
        "deepspeed.git_version_info": SimpleNamespace(installed_ops={}),
        "torch.utils.cpp_extension": SimpleNamespace(_get_build_directory=folder),
    }
    monkeypatch.setattr(deepspeed_io, "import_module", modules.__getitem__)
    extension, why = deepspeed_io.opened.__wrapped__()
    assert isinstance(extension, Extension) and why == "" and built == [False]

    def fail(verbose: bool) -> None:
        raise RuntimeError("no compiler\nat all")

    builder.load = fail
    assert deepspeed_io.opened.__wrapped__() == (None, "it does not compile: no compiler")


@pytest.mark.parametrize("by_deepspeed", [False, True])
@pytest.mark.parametrize(("layers", "resident"), [(4, 0), (5, 0), (7, 2), (2, 0), (3, 2)])
def test_layers_from_a_disk_give_the_very_same(
    layers: int, resident: int, by_deepspeed: bool, tmp_path: Path
) -> None:
    whole, streamed = Stack(layers), Stack(layers)
    streaming = Streaming(layers, resident)
    parts = [spots(streamed.layers[i], f"layers.{i}") for i in streaming.streamed]
    file = LayerFile(tmp_path, [part for part, _ in parts], [size for _, size in parts])
    for name, parameter in streamed.named_parameters():
        given = file.allocate(name)
        assert (given is None) == (int(name.split(".")[1]) not in streaming.streamed)
        if given is not None:
            given.copy_(parameter)
    del given
    with torch.no_grad():
        for i in streaming.streamed:
            for parameter in streamed.layers[i].parameters():
                parameter.zero_()  # what is computed with came from the file
    extension = Extension()
    reads = AsyncReads(extension, file, on_gpu=False) if by_deepspeed else None
    found = stream(streamed, streaming, CPU, file, reads)
    assert isinstance(found, Stream)
    assert list(tmp_path.iterdir()) == []
    for step in range(4):
        x = torch.full((2, 7), 0.1 * step + 0.1)
        assert torch.equal(streamed(x), whole(x))
    assert (len(extension.reads) > 0) == (by_deepspeed and layers - resident > BUFFERS)


def test_a_disk_without_room_is_said_with_its_figures(tmp_path: Path) -> None:
    with pytest.raises(BadLayout, match=r"keeps 9000000\.0 GB of weights in .* which has room for"):
        LayerFile(tmp_path, [{}], [9 * 10**15])
    (tmp_path / "file").write_text("")
    with pytest.raises(BadLayout, match=r"--offload-dir .*file: .*; give a folder on a disk with room"):
        LayerFile(tmp_path / "file", [{}], [4096])


def test_a_weight_that_has_not_come_is_an_error_and_not_an_answer() -> None:
    model = Stack(4)
    stream(model, Streaming(4, 0), CPU)
    x = model.layers[0](torch.ones(1, 7))
    with pytest.raises(AssertionError, match="buffer 0 has 2, not 0"):
        model.layers[0](x)


def test_only_buffers_and_resident_layers_are_on_the_device() -> None:
    model = Stack(8)
    before, layer = resident_bytes(model), 2048
    found = stream(model, Streaming(8, 2), CPU)
    assert isinstance(found, Stream)
    resident = sum(p.nbytes for i in (0, 4) for p in model.layers[i].parameters())
    kept = resident_bytes(model)
    assert kept <= resident + BUFFERS * layer
    assert kept < before + BUFFERS * layer
    assert found.step_bytes > 0


class Summed(nn.Module):
    """A layer with two sums between ranks, as a transformer's has."""

    def __init__(self, overlap: Overlap) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self._overlap = overlap

    def forward(self, x: Tensor) -> Tensor:
        half = self._overlap.all_reduce(self.first(x).view(-1)).view(x.shape)
        return self._overlap.all_reduce(self.second(half).view(-1)).view(x.shape)


@pytest.mark.parametrize("layers", [2, 3, 4, 5])
def test_two_parts_of_a_batch_take_turns_over_the_same_buffers(layers: int) -> None:
    def made() -> tuple[Overlap, Stack]:
        overlap, model = Overlap(TwoRanks()), Stack(0)
        torch.manual_seed(1)
        model.layers = nn.ModuleList(Summed(overlap) for _ in range(layers))
        return overlap, model.requires_grad_(False)

    (_, whole), (overlap, streamed) = made(), made()
    stream(streamed, Streaming(layers, 0), CPU)
    parts = [torch.ones(2, 3), torch.full((2, 3), 2.0)]
    for _ in range(2):
        found = overlap.run([lambda x=x: streamed(x) for x in parts])
        for x, got in zip(parts, found, strict=True):
            assert torch.equal(got, whole(x))


@pytest.mark.parametrize(
    ("room", "resident"), [(80, 8), (1000, 8), (79, 5), (70, 5), (69, 4), (20, 0), (29, 0)]
)
def test_as_many_layers_stay_as_fit_beside_two_buffers(room: int, resident: int) -> None:
    assert resident_layers(8, 10, room) == resident


def test_what_cannot_be_offloaded_is_said_with_its_figures() -> None:
    with pytest.raises(BadLayout, match=r"needs 2 layers of 1\.00 GB .* and 1\.90 GB is left"):
        resident_layers(8, 10**9, 19 * 10**8)
    with pytest.raises(BadLayout, match=r"keeps 50\.0 GB .* of which 40\.0 GB is available"):
        check_host(50 * 10**9, 40 * 10**9)
    check_host(40 * 10**9, 40 * 10**9)


def test_a_plan_says_what_a_disk_allows() -> None:
    spec, layout, machine = builtin("qwen2.5-32b"), Layout.parse("tp2+offload"), box("rtx-4090", 2)
    (asked,) = plan(spec, machine, Workload(), "bfloat16", layouts=[layout]).candidates
    source = ModelSource("qwen2.5-32b", None, SourceKind.BUILTIN)
    sizes = (True, None, 256, 2048, 16, None, True, 0, None, True)
    options = EngineOptions(source, spec, "cuda", "bfloat16", *sizes)
    layer = 2 * spec.layer_params
    every = streamed_bytes(replace(options, resident_layers=0), asked, machine, Workload())
    assert every == pytest.approx(spec.layers * layer, rel=0.01)  # both ranks read the one disk
    half = streamed_bytes(replace(options, resident_layers=32), asked, machine, Workload())
    assert half == pytest.approx(every / 2, rel=0.01)
    assert (
        streamed_bytes(replace(options, resident_layers=62), asked, machine, Workload()) == 0
    )  # in the buffers
    nowhere = replace(options, resident_layers=62, offload_dir=Path("/proc/nothing"))
    with pytest.raises(
        UserError, match=r"--offload-dir /proc/nothing: .*; give a folder on a disk with room"
    ):
        tell_disk(nowhere, asked, machine, Workload(), Progress(quiet=True))
    told = streamed_bytes(options, asked, machine, Workload())
    assert 0 < told < every
    (int8,) = plan(
        spec, machine, Workload(), "bfloat16", layouts=[Layout.parse("tp2+int8+offload")]
    ).candidates
    kept = streamed_bytes(replace(options, resident_layers=0, format="int8"), int8, machine, Workload())
    assert kept == pytest.approx(every / 2, rel=0.01)
    assert limit("tp2+offload", 20 * 10**9, 5e9).endswith(
        "reads 5.00 GB/s: one request gets about 0.25 tokens/s"
    )


class Nodes:
    """A gang of two ranks on one node and one on another, whose disks have 50 and 10 GB left."""

    def __init__(self) -> None:
        places = (("10.0.0.1", "a"), ("10.0.0.2", "b"), ("10.0.0.1", "a"))
        self.members = tuple(Member(i, ip, node, 100 + i, 0, "") for i, (ip, node) in enumerate(places))
        self.timed: list[tuple[int, bool]] = []
        self.answers: dict[str, object] = {}

    def call(self, index: int, method: str, timed: bool = False) -> Call:
        if method in self.answers:
            told = Call(self.members[index], method)
            told.settle(Answer(self.answers[method]))
            return told
        assert method == "disk_room"
        self.timed.append((index, timed))
        member, gb = self.members[index], 10**9
        answered = Call(member, method)
        free = 50 * gb if member.node_id == "a" else 10 * gb
        answered.settle(Answer(DiskRoom(9 * gb, 7 * gb, free, 2e9 if timed else None)))
        return answered


def test_in_a_cluster_each_nodes_own_disk_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    spec = builtin("qwen2.5-32b")
    source = ModelSource("qwen2.5-32b", None, SourceKind.BUILTIN)
    sizes = (True, None, 256, 2048, 16, None, True, 0)
    asked = EngineOptions(source, spec, "cuda", "bfloat16", *sizes, "10.0.0.1:6379", True)
    asked = replace(asked, offload=True, offload_dir=Path("/nowhere/here"))
    gang = Nodes()
    placed = [Placed(cast(Gang, gang), (0, 2, 1))]
    check_disks(placed, "tp3+offload", asked, Progress())
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" s  ")[2] for line in told] == [
        "tp3+offload: 14.00 GB come from the disk of 10.0.0.1 at every step, which reads 2.00 GB/s: "
        "one request gets about 0.14 tokens/s",
        "tp3+offload: 7.00 GB come from the disk of 10.0.0.2 at every step, which reads 2.00 GB/s: "
        "one request gets about 0.29 tokens/s",
    ]
    assert gang.timed == [(0, True), (2, False), (1, True)]  # ranks of a node share a disk
    two = [Placed(cast(Gang, gang), (0, 2, 1)), Placed(cast(Gang, gang), (0, 2, 1))]
    with pytest.raises(
        BadLayout, match=r"keeps 18\.0 GB of weights in /nowhere/here of 10\.0\.0\.2, which has room for 10"
    ):
        check_disks(two, "tp3dp2+offload", asked, Progress(quiet=True))
    here = Nodes()
    check_disks(
        [Placed(cast(Gang, here), (0, 1, 2))], "tp3+offload", replace(asked, address=None), Progress()
    )
    assert capsys.readouterr().err == ""  # it was told before the start
    assert not any(timed for _, timed in here.timed)


def test_a_cap_counts_what_went_since_the_process_came() -> None:
    gb = 10**9
    assert capped_free(25 * gb, 80 * gb, 78 * gb) == 23 * gb - CONTEXT_BYTES
    assert capped_free(25 * gb, 10 * gb, 8 * gb) == 8 * gb  # others have the rest


def test_a_plan_goes_by_the_share_of_a_card_that_an_engine_takes() -> None:
    (card,) = box("h100", 1).devices
    (shared,) = capped(box("h100", 1), None, share=0.9).devices
    assert card.free_bytes - shared.free_bytes == pytest.approx(0.1 * card.memory_bytes + GAP_BYTES, abs=2)
    assert shared.memory_bytes == card.memory_bytes
    (small,) = capped(box("h100", 1), 20.0, share=0.9).devices
    assert (small.memory_bytes, small.free_bytes) == (20 * 10**9, int((1 - CAP_SLACK) * 20e9))
    assert capped(box("cpu", 1, pool="host"), None, share=0.9) == box("cpu", 1, pool="host")


def test_a_plan_says_how_many_layers_stay_and_a_cap_leaves_fewer() -> None:
    spec, layout = builtin("qwen2.5-32b"), Layout.parse("tp1+offload")
    kept = []
    for machine in (box("rtx-4090", 1), capped(box("rtx-4090", 1), 20.0)):
        (found,) = plan(spec, machine, Workload(), "bfloat16", layouts=[layout]).candidates
        assert found.feasible and found.not_runnable is None
        (told,) = [note for note in found.marked if "resident" in note]
        resident, of = re.match(r"(\d+) of a rank's (\d+) layers resident; [\d.]+ GB come", told).groups()
        assert of == "64"
        kept.append(int(resident))
    assert 64 > kept[0] > kept[1] > 0


def test_what_stays_in_the_buffers_comes_but_once() -> None:
    assert Residence(8, 8, 0).told == "all 8 layers of a rank stay on its device"
    assert Residence(8, 6, 0).told == "all 8 layers of a rank stay on its device, 2 in the buffers"
    assert "6 of a rank's 8 layers stay on its device; 2.00 GB come" in Residence(8, 6, 2 * 10**9).told
