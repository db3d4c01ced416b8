"""Makes a virtual environment that has pip: `python3 launch/environment.py .venv`. Needs nothing but Python.

Debian and Ubuntu leave ensurepip out of python3, and to install it takes root. Where it is missing, pip's own
wheel comes from the package index, is checked against the digest below, and installs itself. An environment
that has pip is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urljoin

PIP_WHEEL = "pip-25.3-py3-none-any.whl"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"  # of the file on pypi.org
INDEX = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"  # PEP 691
_TIMEOUT_S = 60.0


def main(argv: list[str], index: str) -> int:
    if len(argv) != 1:
        print("usage: python3 launch/environment.py DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(argv[0])
    try:
        make(directory, index)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"no environment in {directory}: {error}", file=sys.stderr)
        return 2
    return 0


def make(directory: Path, index: str) -> None:
    """Raises OSError, ValueError or CalledProcessError."""
    python = directory / "bin" / "python"
    if _has_pip(python):
        return
    ensurepip = importlib.util.find_spec("ensurepip") is not None
    venv.create(directory, with_pip=ensurepip, symlinks=True)
    if ensurepip:
        return
    with tempfile.TemporaryDirectory() as temporary:
        wheel = Path(temporary, PIP_WHEEL)
        wheel.write_bytes(_fetch_pip(index))
        subprocess.run([python, wheel / "pip", "install", "--no-index", wheel], check=True)


def _has_pip(python: Path) -> bool:
    return (
        python.exists() and not subprocess.run([python, "-c", "import pip"], capture_output=True).returncode
    )


def _fetch_pip(index: str) -> bytes:
    page = f"{index.rstrip('/')}/pip/"
    try:
        files = json.loads(_get(page, _JSON))["files"]
        url = next(file["url"] for file in files if file["filename"] == PIP_WHEEL)
        wheel = _get(urljoin(page, url), "*/*")
    except (OSError, ValueError, LookupError, StopIteration) as error:
        raise ValueError(
            f"this Python has no ensurepip, and {page} gives no {PIP_WHEEL} ({str(error) or 'not listed'}). "
            "As root: apt install python3-venv"
        ) from None
    if (digest := hashlib.sha256(wheel).hexdigest()) != PIP_SHA256:
        raise ValueError(f"{PIP_WHEEL} from {page} has the SHA-256 {digest}; it must be {PIP_SHA256}")
    return wheel


def _get(url: str, accept: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        body: bytes = response.read()
        return body


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("PIP_INDEX_URL", INDEX)))
