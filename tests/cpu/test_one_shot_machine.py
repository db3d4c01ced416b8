"""The protocols of one_shot.cu on simulated GPUs, whose stores come late and in any order; faults are found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.collectives import one_shot

HERE = Path(__file__).parent
CHUNK_PACKETS = 64  # small ones, so that small messages have many
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def build(folder: Path, ranks: int, *changes: tuple[str, str]) -> Path:
    """one_shot.cu with these changes, but for its hardware, which one_shot_machine.h simulates."""
    source = Path(one_shot.__file__).with_name("one_shot.cu").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    before, _, after = source.partition("// -- the hardware")
    kernels = before + after.partition("// -- elements")[2].partition("\n")[2]
    (folder / "kernels.inc").write_text(kernels)
    defines = one_shot.sizes(ranks) | {"CHUNK_PACKETS": CHUNK_PACKETS}
    options = [f"-D{name}={value}" for name, value in defines.items()]
    program = folder / "machine"
    command = ["g++", "-std=c++17", "-O1", "-w", f"-I{HERE}", f"-I{folder}", *options]
    subprocess.run([*command, str(HERE / "one_shot_machine.cpp"), "-o", str(program)], check=True)
    return program


def run(program: Path, seed: int, steps: int, first: int = 1, releases: bool = True) -> str:
    command = [str(program), str(seed), str(steps), str(first), str(int(releases))]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100).stdout.strip()


@pytest.mark.parametrize(("ranks", "steps"), [(2, 25), (3, 12)])
def test_sums_are_right_whatever_order_stores_land_in(tmp_path: Path, ranks: int, steps: int) -> None:
    program = build(tmp_path, ranks)
    assert [run(program, seed, steps) for seed in range(2)] == ["right"] * 2
    assert run(program, 3, steps, first=2**32 - steps // 2) == "right"  # the sequence number starts again
    assert "protocol 1" in run(program, 4, steps, releases=False)  # a flag that comes before its data


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return Step{flag, flag & 1, 0, 0};", "return Step{flag, 0, 0, 0};"),  # one slot
        ("store_packet(from, make_uint4(NOTHING, NOTHING, NOTHING, NOTHING));", ""),  # nothing written back
    ],
)
def test_a_protocol_that_is_wrong_is_found_out(tmp_path: Path, old: str, new: str) -> None:
    program = build(tmp_path, 2, (old, new))
    assert any(run(program, seed, 40) != "right" for seed in range(3))
