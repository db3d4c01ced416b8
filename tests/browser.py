"""A headless browser, where there is one: what a page looks like and what it says on its console."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60.0
_CONSOLE = re.compile(r"(?:CONSOLE[:(]\d+\)?\]) (.*)")


@dataclass(frozen=True, slots=True)
class Seen:
    dom: str  # after its scripts ran
    console: tuple[str, ...]
    screenshot: bytes  # PNG


def find() -> str:
    """Skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the path")
    return found


def look(url: str, *, size: tuple[int, int] = (1100, 1600), for_ms: int = 3000) -> Seen:
    """The page after `for_ms` of its own time."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        command = [find(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            "--enable-logging=stderr",
            f"--virtual-time-budget={for_ms}",
            f"--user-data-dir={folder}/profile",
        ]
        command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}", "--dump-dom", url]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return Seen(ran.stdout, tuple(_CONSOLE.findall(ran.stderr)), shot.read_bytes())
