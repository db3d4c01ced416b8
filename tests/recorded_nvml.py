"""NVML's answers on a real machine, kept and given again: `python -m tests.recorded_nvml FILE` writes them as JSON.

What was not asked or not answered then is not supported in the replay, as on a card that does not know it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from cluster.nvml import read_gpus

Answers = dict[str, Any]  # question with its arguments -> answer, or {"error": NVML's code}


class Recorder:
    """A binding that notes what another one, `pynvml` by itself, answers."""

    def __init__(self, binding: Any = pynvml) -> None:
        self._binding = binding
        self._handles: dict[int, str] = {}  # id of a handle -> its name in the notes
        self._kept: list[Any] = []  # so that no id comes twice
        self.answers: Answers = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._binding, name)
        if not name.startswith("nvml") or name in ("nvmlInit", "nvmlShutdown"):
            return found
        return lambda *args: self._asked(name, found, args)

    def _asked(self, name: str, ask: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        question = question_of(name, [self._handles.get(id(arg), arg) for arg in args])
        try:
            answer = ask(*args)
        except self._binding.NVMLError as error:
            self.answers[question] = {"error": error.value}
            raise
        if name == "nvmlDeviceGetHandleByIndex":
            self._handles[id(answer)] = f"gpu{args[0]}"
            self._kept.append(answer)
        else:
            self.answers[question] = plain(answer)
        return answer


class Recorded:
    """A binding that answers by such notes."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"gpu{index}"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return getattr(pynvml, name)
        return lambda *args: self._answer(question_of(name, args))

    def _answer(self, question: str) -> Any:
        answer = self._answers.get(question, {"error": pynvml.NVML_ERROR_NOT_SUPPORTED})
        if isinstance(answer, dict) and "error" in answer:
            raise pynvml.NVMLError(answer["error"])
        return objects(answer)


def question_of(name: str, args: Any) -> str:
    return f"{name}({', '.join(str(arg) for arg in args)})"


def plain(value: Any) -> Any:
    """Structures as dictionaries of their fields."""
    if isinstance(value, ctypes.Structure | ctypes.Union):
        return {field[0]: plain(getattr(value, field[0])) for field in value._fields_}
    if isinstance(value, list | tuple | ctypes.Array):
        return [plain(part) for part in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, int | float | str | None) else plain_fields(value)


def plain_fields(value: Any) -> dict[str, Any]:
    return {name: plain(part) for name, part in vars(value).items()}


def objects(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{name: objects(part) for name, part in value.items()})
    return [objects(part) for part in value] if isinstance(value, list) else value


def recorded(path: Path) -> Recorded:
    return Recorded(json.loads(path.read_text())["answers"])


def main(path: str) -> None:
    recorder = Recorder()
    report = read_gpus(recorder)
    made = {"source": f"python -m tests.recorded_nvml, driver {report.driver}", "answers": recorder.answers}
    Path(path).write_text(json.dumps(made, indent=1) + "\n")
    print(
        f"{len(report.gpus)} GPUs, {len(recorder.answers)} answers{report.problem and ': ' + report.problem}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
