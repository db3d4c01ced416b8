"""How fast this node is wired to others, as Linux's sysfs tells: what a network of Ray nodes can do at most."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CLASSES = Path("/sys/class")


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    bytes_per_s: float  # one direction, raw


def fastest_interface(classes: Path = _CLASSES) -> Interface | None:
    """The fastest that is up: InfiniBand's port or a network card; None where none tells its speed (virtual ones)."""
    found = [*_infiniband(classes / "infiniband"), *_cards(classes / "net")]
    return max(found, key=lambda interface: interface.bytes_per_s, default=None)


def _cards(folder: Path) -> list[Interface]:
    """Those with hardware under them, unlike bridges and tunnels; their speed is told in Mb/s, -1 where unknown."""
    up = [
        path for path in _inside(folder) if (path / "device").exists() and _text(path / "operstate") == "up"
    ]
    speeds = [(path.name, _text(path / "speed")) for path in up]
    return [Interface(name, int(speed) * 1e6 / 8) for name, speed in speeds if speed.isdigit() and int(speed)]


def _infiniband(folder: Path) -> list[Interface]:
    """`400 Gb/sec (4X NDR)` of each port whose state is `4: ACTIVE`."""
    found = []
    for port in (port for card in _inside(folder) for port in _inside(card / "ports")):
        rate = re.match(r"([\d.]+) Gb/sec", _text(port / "rate"))
        if rate and _text(port / "state").endswith("ACTIVE"):
            found.append(Interface(f"{port.parent.parent.name}:{port.name}", float(rate[1]) * 1e9 / 8))
    return found


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
