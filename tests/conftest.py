"""Where there is no GPU, Triton interprets its kernels; it looks when a kernel is defined, so before any comes in."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(
    1
)  # beside a gang's processes on two cores, two threads wait for each other: ten times as long

settings.register_profile("no deadline", deadline=None)  # an example is slow where the machine is busy
settings.load_profile("no deadline")

PROCESSES = Path(__file__).parent / "cpu"

if os.environ.get("PYTEST_XDIST_WORKER"):  # which ignores Ctrl-C, and so would all that is started here
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "xdist_group(name): run by one of pytest-xdist's workers, in their order"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist (.ci/run): tests that start processes come one by one, beside the others, file by file."""
    for item in items:
        one_by_one = item.path.is_relative_to(PROCESSES)
        item.add_marker(pytest.mark.xdist_group("processes" if one_by_one else item.path.stem))
