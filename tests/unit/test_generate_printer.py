"""What `generate` shows of one answer: as it comes, and what is told after it in a line of its own."""

from __future__ import annotations

import pytest

from launch.generate import _People
from launch.prompts import Prompt
from orchestrator.request import SamplingParams

PROMPTS = [Prompt([1], SamplingParams(), "why", "prompt 1")]


def test_an_answer_that_is_broken_off_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    printer = _People(PROMPTS)
    printer.end()
    printer.stream("Beca")
    printer.end()
    assert capsys.readouterr().out == "Beca\n"
