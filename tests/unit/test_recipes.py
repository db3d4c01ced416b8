"""Recipes: what the shipped ones say, and that every mistake is one clear line."""

import pytest

from cluster.errors import BadRecipe
from cluster.topology import LinkKind
from launch.config import RECIPES, read_machine

GOOD = """
machine:
  devices:
    - {device: rtx-4090, count: 2}
"""


def read(tmp_path, text: str):
    path = tmp_path / "box.yaml"
    path.write_text(text)
    return read_machine(str(path))


def test_every_shipped_recipe_is_read_by_name_and_by_path():
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert {"dual-4090", "h100-node", "2xh100", "cpu"} <= set(names)
    for name in names:
        assert read_machine(name) == read_machine(str(RECIPES / f"{name}.yaml"))
        assert read_machine(name).name == name


def test_dual_4090_has_no_peer_access():
    machine = read_machine("dual-4090")
    assert [device.name for device in machine.devices] == ["NVIDIA GeForce RTX 4090"] * 2
    assert machine.link(0, 1).kind is LinkKind.HOST
    assert read_machine("h100-node").link(0, 7).kind is LinkKind.NVLINK


def test_ranks_of_the_cpu_recipe_share_one_pool():
    pools = {device.pool for device in read_machine("cpu").devices}
    assert len(pools) == 1
    assert "" not in pools


def test_figures_of_the_recipe_stand_in_for_the_sheets(tmp_path):
    machine = read(
        tmp_path,
        """
        machine:
          name: bench
          devices:
            - device: rtx-4090
              memory_gb: 48
              reserved_gb: 2
              gb_per_s: 900
              tflops: {bfloat16: 150}
              usd_per_hour: 0
            - {device: rtx-3090}
          link: {kind: host, latency_us: 30, gb_per_s: 5}
        """,
    )
    first, second = machine.devices
    assert (first.memory_bytes, first.free_bytes) == (48e9, 46e9)
    assert (first.bandwidth_bytes_per_s, first.flops_per_s) == (900e9, {"bfloat16": 150e12})
    assert first.usd_per_hour == 0
    assert second.usd_per_hour == 0.39
    link = machine.link(0, 1)
    assert (link.latency_s, link.bytes_per_s) == (pytest.approx(30e-6), 5e9)
    assert link.all_reduce_latency_s[2] == pytest.approx(30e-6)
    assert machine.name == "bench"


def test_half_the_lanes_halve_the_link(tmp_path):
    half = read(tmp_path, GOOD.replace("count: 2", "count: 2, pcie_lanes: 8"))
    whole = read(tmp_path, GOOD)
    assert half.link(0, 1).bytes_per_s == pytest.approx(whole.link(0, 1).bytes_per_s / 2)
    assert whole.name == "box"


def test_nodes_repeat_the_devices(tmp_path):
    machine = read(tmp_path, GOOD + "  nodes: 2\n")
    assert [device.node for device in machine.devices] == ["node0", "node0", "node1", "node1"]
    assert machine.link(0, 1).kind is LinkKind.HOST
    assert machine.link(1, 2).kind is LinkKind.NETWORK


def test_on_reads_only_machine_but_knows_the_other_keys(tmp_path):
    read(tmp_path, GOOD + "serve: {port: 8000}\nobjective: {concurrency: 4}\nmodel: {name: smollm2}\n")
    with pytest.raises(BadRecipe, match="serve has an unknown key 'prot'; the nearest known is port"):
        read(tmp_path, GOOD + "serve: {prot: 8000}\n")


MISTAKES = {
    "machines: {}": "unknown key 'machines'; the nearest known is machine",
    "machine: {devcies: []}": "unknown key 'devcies'; the nearest known is devices",
    "machine: {devices: [{devise: rtx-4090}]}": r"devices\[0\] has an unknown key 'devise'; .* device",
    "machine: {devices: [{count: 2}]}": r"devices\[0\] lacks device",
    "machine: {devices: [{device: rtx-490}]}": "unknown device 'rtx-490'",
    "machine: {devices: []}": r"devices is \[\]; it must be a list",
    "machine: {devices: rtx-4090}": "devices is 'rtx-4090'; it must be a list",
    "machine: {devices: [rtx-4090]}": r"devices\[0\] is 'rtx-4090'; it must be a mapping",
    "machine: {name: x}": "devices is None",
    "machine: [1]": r"machine is \[1\]; it must be a mapping",
    "machine:": "no section machine",
    "serve: {}": "no section machine",
    "just words": "is 'just words'; it must be a mapping",
    "": "is empty",
    "# only a comment": "is empty",
    "machine: {devices: [{device: h100, count: 0}]}": "count is 0; it must be a whole number from 1 to 64",
    "machine: {devices: [{device: h100, count: 2.5}]}": "count is 2.5",
    "machine: {devices: [{device: h100, count: true}]}": "count is True",
    "machine: {devices: [{device: h100, count: 60}], nodes: 2}": "120 devices; at most 64",
    "machine: {devices: [{device: h100, memory_gb: -1}]}": "memory_gb is -1; it must be a number above 0",
    "machine: {devices: [{device: h100, memory_gb: .nan}]}": "memory_gb is nan",
    "machine: {devices: [{device: h100, gb_per_s: fast}]}": "gb_per_s is 'fast'",
    "machine: {devices: [{device: h100, reserved_gb: 99}]}": "reserved_gb is 99 of 85.5 GB",
    "machine: {devices: [{device: h100, tflops: {bf16: 1}}]}": "unknown key 'bf16'; the nearest known is",
    "machine: {devices: [{device: h100, tflops: {float16: }}]}": "tflops lacks float16",
    "machine: {devices: [{device: h100}], link: nvlik}": "kind is 'nvlik'; the nearest known is nvlink",
    "machine: {devices: [{device: l4, count: 2}], link: nvlink}": "l4 has no NVLink",
    "machine: {devices: [{device: h100, count: 2}], link: {latency_us: 3}}": "link lacks kind",
    "machine: {devices: [{device: h100": "is not YAML: did not find expected",
    "machine:\n\t- x": "line 2 is not YAML",
    "machine: !!python/object:os.system {}": "is not YAML: could not determine a constructor",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_and_where(tmp_path, text):
    with pytest.raises(BadRecipe, match=MISTAKES[text]) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_those_that_ship(tmp_path):
    with pytest.raises(BadRecipe, match=r"does not exist; .*dual-4090"):
        read_machine(str(tmp_path / "none.yaml"))
    with pytest.raises(BadRecipe, match="is a directory"):
        read_machine(str(tmp_path))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "box.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(BadRecipe, match="cannot be read") as caught:
        read_machine(str(path))
    assert "\n" not in str(caught.value)
