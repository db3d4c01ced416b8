"""Recipes: what the shipped ones say, and that every mistake is one clear line."""

import json
from dataclasses import replace

import pytest

from cluster.discover import discover
from cluster.errors import BadRecipe
from cluster.profile import save
from cluster.topology import LinkKind
from launch.__main__ import main
from launch.config import RECIPES, read_machine
from launch.recipe import to_recipe
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, dual_h100
from tests.unit.test_measure import profile_of

GOOD = """
machine:
  devices:
    - {device: rtx-4090, count: 2}
"""

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read(tmp_path, text: str):
    path = tmp_path / "box.yaml"
    path.write_text(text)
    return read_machine(str(path))


def test_every_shipped_recipe_is_read_by_name_and_by_path():
    assert set(SHIPPED) >= {"dual-4090", "h100-node", "2xh100", "cpu"}
    for name in SHIPPED:
        assert read_machine(name) == read_machine(str(RECIPES / f"{name}.yaml"))
        assert read_machine(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_planned_for(name, capsys):
    code = main(["plan", "llama-3.1-8b", "--on", name, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["machine"] == name
    assert (code, answer["chosen"] is None) == ((3, True) if name == "cpu" else (0, False))
    assert all(c["feasible"] or c["reason"] for c in answer["candidates"])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dual-3090", {LinkKind.HOST}),
        ("dual-3090-nvlink", {LinkKind.NVLINK}),
        ("dual-5090", {LinkKind.HOST}),
        ("dual-rtx-pro-6000", {LinkKind.PCIE}),
        ("4xl40s", {LinkKind.PCIE}),
        ("8xa100", {LinkKind.NVLINK}),
        ("mixed-4090-3090", {LinkKind.HOST}),
        ("two-h100-nodes", {LinkKind.NVLINK, LinkKind.NETWORK}),
    ],
)
def test_what_links_the_shipped_machines_have(name, kinds):
    assert {link.kind for link in read_machine(name).links.values()} == kinds


def test_figures_that_recipes_state_in_words():
    assert (
        read_machine("dual-4090-x8").link(0, 1).bytes_per_s
        == read_machine("dual-4090").link(0, 1).bytes_per_s / 2
    )
    between_nodes = read_machine("two-h100-nodes").link(7, 8)
    assert (between_nodes.latency_s, between_nodes.bytes_per_s) == (pytest.approx(18e-6), 36e9)


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


def test_pairs_and_the_network_may_differ_from_the_rest(tmp_path):
    machine = read(
        tmp_path,
        """
        machine:
          nodes: 2
          devices: [{device: rtx-3090, count: 2}]
          link: host
          links: [{between: [1, 0], kind: nvlink, latency_us: 8}]
          network: {gb_per_s: 1.25}
        """,
    )
    assert [machine.link(a, b).kind for a, b in ((0, 1), (2, 3), (1, 2))] == [
        LinkKind.NVLINK,
        LinkKind.HOST,
        LinkKind.NETWORK,
    ]
    assert machine.link(0, 1).latency_s == pytest.approx(8e-6)
    assert machine.link(0, 3).bytes_per_s == 1.25e9


def test_a_card_that_the_catalogue_lacks_is_described_in_full(tmp_path):
    device = "{device: Imaginary 1, memory_gb: 20, gb_per_s: 500, tflops: {bfloat16: 50}}"
    [card] = read(tmp_path, f"machine: {{devices: [{device}]}}").devices
    assert (card.name, card.memory_bytes, card.flops_per_s) == ("Imaginary 1", 20e9, {"bfloat16": 50e12})
    with pytest.raises(BadRecipe, match="or describe it in full: it lacks tflops"):
        read(tmp_path, "machine: {devices: [{device: Imaginary 1, memory_gb: 20, gb_per_s: 500}]}")


def machines():
    bus = [f"00000000:0{n}:00.0" for n in range(1, 4)]
    bridged = [
        FakeGpu("NVIDIA GeForce RTX 3090", 24576, bus[0], nvlink=(bus[1],) * 4),
        FakeGpu("NVIDIA GeForce RTX 3090", 24576, bus[1], nvlink=(bus[0],) * 4),
        FakeGpu("NVIDIA Imaginary 1", 24564, bus[2], pcie=(4, 4, 8, 16)),
    ]
    return {
        "dual 4090": discover(binding=dual_4090()),
        "dual H100": discover(binding=dual_h100()),
        "two bridged and a card that nobody knows": discover(binding=FakeNvml(bridged, peer_access=False)),
        "two nodes": read_machine("two-h100-nodes"),
        "cpu": read_machine("cpu"),
        "mixed": read_machine("mixed-4090-3090"),
    }


@pytest.mark.parametrize("name", machines())
def test_a_machine_written_as_a_recipe_is_read_back(name, tmp_path):
    machine = machines()[name]
    back = read(tmp_path, to_recipe(machine, "from a test\nof two lines"))
    assert back.name == machine.name
    assert min(back.host_bytes.values(), default=0) == pytest.approx(
        min(machine.host_bytes.values(), default=0), rel=1e-3
    )
    for one, other in zip(machine.devices, back.devices, strict=True):
        assert (one.kind, one.memory_bytes) == (other.kind, other.memory_bytes)
        assert one.free_bytes == pytest.approx(other.free_bytes, abs=2)
        assert one.bandwidth_bytes_per_s == pytest.approx(other.bandwidth_bytes_per_s, rel=1e-3)
        assert one.flops_per_s == pytest.approx(other.flops_per_s, rel=1e-3)
        assert one.usd_per_hour == other.usd_per_hour
    assert machine.links.keys() == back.links.keys()
    for pair, link in machine.links.items():
        again = back.links[pair]
        assert link.kind is again.kind
        assert (link.latency_s, link.bytes_per_s) == pytest.approx(
            (again.latency_s, again.bytes_per_s), rel=1e-3
        )


def test_nodes_that_differ_cannot_be_written():
    machine = read_machine("two-h100-nodes")
    with pytest.raises(BadRecipe, match="nodes that differ"):
        to_recipe(replace(machine, devices=machine.devices[1:]), "")
    slower = replace(machine.devices[0], bandwidth_bytes_per_s=1e12)
    with pytest.raises(BadRecipe, match="nodes that differ"):
        to_recipe(replace(machine, devices=(slower, *machine.devices[1:])), "")


def test_nodes_whose_free_memory_differs_are_written_as_the_fullest(tmp_path):
    machine = read_machine("two-h100-nodes")
    fuller = replace(machine.devices[9], free_bytes=50 * 10**9)
    devices = (*machine.devices[:9], fuller, *machine.devices[10:])
    back = read(tmp_path, to_recipe(replace(machine, devices=devices), ""))
    assert [back.devices[n].free_bytes for n in (1, 9)] == pytest.approx([50 * 10**9] * 2, abs=2)
    assert back.devices[0].free_bytes == pytest.approx(machine.devices[0].free_bytes, abs=2)


def test_a_profile_stands_for_the_machine_that_was_measured(tmp_path, capsys):
    path = tmp_path / "box.json"
    save(profile_of(), path)
    machine = read_machine(str(path))
    assert machine.name == "Some CPU, 2 cores"
    assert machine.link(0, 1).bytes_per_s == pytest.approx(1e9), "the least of its curves"
    assert main(["plan", "smollm2", "--on", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == machine.name
    path.write_text("{}")
    with pytest.raises(BadRecipe, match="is no profile of this version"):
        read_machine(str(path))


MISTAKES = {
    "machine: {devices: [{device: h100, count: 2}], links: {}}": r"links is \{\}; it must be a list",
    "machine: {devices: [{device: h100, count: 2}], links: [{between: [0, 2], kind: host}]}": "positions from 0 to 1",
    "machine: {devices: [{device: h100, count: 2}], links: [{between: [1, 1], kind: host}]}": r"between is \[1, 1\]",
    "machine: {devices: [{device: h100, count: 2}], links: [{between: [0, 1]}]}": r"links\[0\] lacks kind",
    "machine: {devices: [{device: h100}], nodes: 2, network: {gbps: 1}}": "nearest known is gb_per_s",
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
    "machine: {devices: [{device: h100, count: 0}]}": "count is 0; it must be a whole number from 1 to 512",
    "machine: {devices: [{device: h100, count: 2.5}]}": "count is 2.5",
    "machine: {devices: [{device: h100, count: true}]}": "count is True",
    "machine: {devices: [{device: h100, count: 60}], nodes: 9}": "540 devices; at most 512",
    "machine: {devices: [{device: h100, memory_gb: -1}]}": "memory_gb is -1; it must be a number above 0",
    "machine: {devices: [{device: h100, memory_gb: .nan}]}": "memory_gb is nan",
    "machine: {devices: [{device: h100}], host_memory_gb: 0}": "host_memory_gb is 0; it must be a number above 0",
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


def test_another_kind_of_file_is_not_printed_whole(tmp_path):
    with pytest.raises(BadRecipe, match=r"is 'words .*'; it must be a mapping") as caught:
        read(tmp_path, "words " * 1000)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "box.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(BadRecipe, match="cannot be read") as caught:
        read_machine(str(path))
    assert "\n" not in str(caught.value)
