"""How cards hang on the host and the host on its network, on injected trees of sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.network import Interface, fastest_interface
from cluster.pci import Hop, Slot, local_cores, read_slot

CARD = "0000:01:00.0"


def tree(
    root: Path, *places: tuple[str, str, str], group: tuple[int, str] | None = None, vendor: str = "0x1022"
) -> Path:
    """(address, most GT/s, lanes now) from the root port down to the card. → the folder of all devices."""
    place = root / "devices" / "pci0000:00"
    for address, speed, lanes in places:
        place = place / address
        place.mkdir(parents=True)
        (place / "max_link_speed").write_text(f"{speed} GT/s PCIe\n")
        (place / "current_link_width").write_text(f"{lanes}\n")
        (place / "vendor").write_text(f"{vendor}\n")
    devices = root / "bus"
    devices.mkdir()
    (devices / place.name).symlink_to(place)
    if group is not None:
        number, kind = group
        (root / "iommu_groups" / str(number)).mkdir(parents=True)
        (root / "iommu_groups" / str(number) / "type").write_text(f"{kind}\n")
        (place / "iommu_group").symlink_to(root / "iommu_groups" / str(number))
    return devices


def test_a_card_in_the_processors_own_slot(tmp_path: Path) -> None:
    devices = tree(tmp_path, ("0000:00:01.1", "16.0", "16"), (CARD, "16.0", "16"), group=(14, "DMA-FQ"))
    slot = read_slot(CARD, devices)
    assert slot == Slot((Hop(CARD, 4, 16),), chipset=False, iommu="DMA-FQ", iommu_group=14)
    assert slot.narrowest is None


def test_a_card_behind_a_chipset_with_four_lanes(tmp_path: Path) -> None:
    """AMD's X570: its port to the processor, its own bridge, the slot."""
    places = [
        ("0000:00:01.2", "16.0", "4"),
        ("0000:02:00.0", "16.0", "4"),
        ("0000:03:08.0", "16.0", "16"),
        (CARD, "16.0", "16"),
    ]
    slot = read_slot(CARD, tree(tmp_path, *places))
    assert slot.narrowest == Hop("0000:02:00.0", 4, 4)
    assert slot.narrowest.gb_per_s == pytest.approx(7.876)
    assert (slot.iommu, slot.iommu_group) == ("", None)


def test_a_switch_as_wide_as_its_cards_is_no_bottleneck(tmp_path: Path) -> None:
    places = [
        ("0000:00:01.2", "32.0", "16"),
        ("0000:02:00.0", "32.0", "16"),
        ("0000:03:08.0", "32.0", "16"),
        (CARD, "16.0", "16"),
    ]
    assert read_slot(CARD, tree(tmp_path, *places)).narrowest is None


@pytest.mark.parametrize(
    ("port", "vendor", "chipset"),
    [
        ("0000:00:1c.4", "0x8086", True),
        ("0000:00:01.0", "0x8086", False),
        ("0000:00:1c.4", "0x1022", False),
    ],
)
def test_intels_chipset_is_known_by_its_ports(tmp_path: Path, port: str, vendor: str, chipset: bool) -> None:
    devices = tree(tmp_path, (port, "8.0", "4"), (CARD, "8.0", "4"), vendor=vendor)
    assert read_slot(CARD, devices).chipset is chipset


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    assert read_slot(CARD, tmp_path) == Slot()
    devices = tree(tmp_path, ("0000:00:01.1", "Unknown", "255"), (CARD, "Unknown", "x"))
    assert read_slot(CARD, devices) == Slot()


def test_the_fastest_way_to_other_nodes(tmp_path: Path) -> None:
    def card(name: str, speed: str, state: str = "up", hardware: bool = True) -> None:
        folder = tmp_path / "net" / name
        (folder / "device" if hardware else folder).mkdir(parents=True)
        (folder / "speed").write_text(f"{speed}\n")
        (folder / "operstate").write_text(f"{state}\n")

    assert fastest_interface(tmp_path) is None
    card("lo", "100000", hardware=False)
    card("virtio", "-1")
    card("unplugged", "100000", state="down")
    assert fastest_interface(tmp_path) is None
    card("eth0", "25000")
    assert fastest_interface(tmp_path) == Interface("eth0", 25e9 / 8)
    for number, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        port = tmp_path / "infiniband" / "mlx5_0" / "ports" / number
        port.mkdir(parents=True)
        (port / "rate").write_text(f"{int(number) * 400} Gb/sec (4X NDR)\n")
        (port / "state").write_text(f"{state}\n")
    assert fastest_interface(tmp_path) == Interface("mlx5_0:1", 50e9)


@pytest.mark.parametrize(
    ("told", "cores"),
    [("0-3,16-17\n", {0, 1, 2, 3, 16, 17}), ("5\n", {5}), ("\n", set()), (None, set())],
)
def test_cores_beside_a_card(tmp_path: Path, told: str | None, cores: set[int]) -> None:
    devices = tree(tmp_path, ("0000:00:01.1", "16.0", "16"), (CARD, "16.0", "16"))
    if told is not None:
        (devices / CARD / "local_cpulist").write_text(told)
    assert local_cores(CARD, devices) == cores
    assert local_cores("", devices) == set(), "a GPU whose address is not known"
