"""How GPUs hang on the host, as Linux's sysfs tells: the links between root port and card, and the IOMMU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")
_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # GT/s, PCIe specifications
_LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # one direction, after encoding
_INTEL = "0x8086"
_INTEL_CHIPSET_PORTS = (
    0x1A,
    0x1B,
    0x1C,
    0x1D,
)  # root ports of the PCH, beside the processor's own at 1 and 6


@dataclass(frozen=True, slots=True)
class Hop:
    """A device's link towards the host: what it can do at most there, and how wide it is now."""

    address: str
    generation: int
    lanes: int

    @property
    def gb_per_s(self) -> float:
        return gb_per_s(self.generation, self.lanes)


@dataclass(frozen=True, slots=True)
class Slot:
    """Of one GPU."""

    hops: tuple[Hop, ...] = ()  # from below the root port down to the card
    chipset: bool = False  # the root port is the chipset's, which shares a few lanes to the processor
    iommu: str = (
        ""  # the kernel's name for how its addresses are translated: DMA, DMA-FQ, identity; empty: not at all
    )
    iommu_group: int | None = None

    @property
    def narrowest(self) -> Hop | None:
        """The link above the card's own that is narrower than it."""
        above = min(self.hops[:-1], key=lambda hop: hop.gb_per_s, default=None)
        return above if above and above.gb_per_s < self.hops[-1].gb_per_s else None


def gb_per_s(generation: int, lanes: int) -> float:
    """Raw rate of a link in one direction."""
    return _LANE_GB_PER_S.get(generation, 0.0) * lanes


def read_slot(pci: str, devices: Path = _DEVICES) -> Slot:
    """What cannot be read (containers, virtual machines) is left out."""
    card = devices / pci
    try:
        places = [
            part
            for part in (*reversed(card.resolve().parents), card.resolve())
            if _ADDRESS.fullmatch(part.name)
        ]
    except OSError:
        return Slot()
    hops = tuple(hop for hop in map(_hop, places[1:]) if hop is not None)
    group = _iommu_group(card)
    return Slot(
        hops=hops,
        chipset=bool(places) and _on_intels_chipset(places[0]),
        iommu=_text(card / "iommu_group" / "type"),
        iommu_group=group,
    )


def local_cores(pci: str, devices: Path = _DEVICES) -> set[int]:
    """Those of the NUMA node that a device hangs on; none where the kernel does not say."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", _text(devices / pci / "local_cpulist"))
    return {core for first, last in ranges for core in range(int(first), int(last or first) + 1)}


def _hop(place: Path) -> Hop | None:
    generation = _GENERATIONS.get(_text(place / "max_link_speed").split(" ")[0])
    lanes = _text(place / "current_link_width")
    return Hop(place.name, generation, int(lanes)) if generation and lanes.isdigit() and int(lanes) else None


def _on_intels_chipset(root_port: Path) -> bool:
    number = int(root_port.name.split(":")[-1].split(".")[0], 16)
    return _text(root_port / "vendor") == _INTEL and number in _INTEL_CHIPSET_PORTS


def _iommu_group(card: Path) -> int | None:
    try:
        return int((card / "iommu_group").resolve().name)
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
