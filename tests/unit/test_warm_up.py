"""Kernels compiled by several threads each keep their own launcher."""

from __future__ import annotations

import threading
from types import ModuleType

import pytest

from orchestrator.engine.warm_up import THREADS, launchers_apart

build = pytest.importorskip("triton.runtime.build")


def test_each_thread_leaves_with_its_own_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ModuleType("__triton_launcher")  # as Python gives a file of that name that was imported before
    loaded = threading.Barrier(4)
    found: dict[str, str] = {}

    def load(_name: str, path: str) -> ModuleType:
        shared.__dict__["launch"] = path
        return shared

    def compile_one(path: str) -> None:
        module = build._load_module_from_path("__triton_launcher", path)
        loaded.wait()
        found[path] = module.launch

    monkeypatch.setattr(build, "_load_module_from_path", load)
    with launchers_apart() as at_once:
        threads = [threading.Thread(target=compile_one, args=(path,)) for path in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {path: path for path in "abcd"}
    assert at_once == THREADS
    assert build._load_module_from_path is load


def test_a_triton_that_loads_otherwise_compiles_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(build, "_load_module_from_path")
    with launchers_apart() as at_once:
        assert at_once == 1
