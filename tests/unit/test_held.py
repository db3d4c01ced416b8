"""What a run holds of a GPU at most, asked of the driver twice a second: cheaply, or the asking slows what is timed."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from tests.bench.held import most_held, visible
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, no_driver

EVERY_S = 0.001
PATIENCE_S = 20.0


class Counting(FakeNvml):
    """Counts what it is asked, and tells when so many looks have come."""

    def __init__(self, gpus: list[FakeGpu]) -> None:
        super().__init__(gpus)
        self.asked: Counter[str] = Counter()
        self.looked = threading.Semaphore(0)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name[4].isupper():
            self.asked[name] += 1
            if name == "nvmlDeviceGetMemoryInfo":
                self.looked.release()
        return super().__getattribute__(name)


def test_the_most_that_was_held_is_told_and_only_memory_is_asked_for() -> None:
    driver = Counting(dual_4090().gpus)
    first, second = driver.gpus
    with most_held([1, 5], driver, EVERY_S) as found:
        for used_mib in (900, 7000, 30):
            second.used_mib = used_mib
            for _ in range(3):  # the look under way may have begun before
                assert driver.looked.acquire(timeout=PATIENCE_S)
        first.used_mib = 20_000  # not asked for
    assert found == [7000 * 2**20]
    looks = driver.asked.pop("nvmlDeviceGetMemoryInfo")
    assert looks >= 9
    assert driver.asked == {
        "nvmlInit": 1,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 1,
        "nvmlShutdown": 1,
    }


def test_without_a_driver_nothing_is_held() -> None:
    with most_held([0], no_driver(), EVERY_S) as found:
        pass
    assert found == [0]


def test_a_child_sees_what_it_is_left() -> None:
    assert visible(2, {}) == [0, 1]
    assert visible(1, {"CUDA_VISIBLE_DEVICES": "3,1"}) == [3]
