"""A batch's answers: each exactly once, whatever is killed on the way, and whatever the file holds."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import AttemptsSpent, BadRequest, GangDied
from orchestrator import jobs
from orchestrator.jobs import Answered, Changed, Halted, Job, check_same, examine
from orchestrator.journal import ERRORS, OUTPUT, Bits, Journal, line_of

LINES = 200
WINDOW = 8


def write_input(path: Path, lines: int = LINES) -> Path:
    path.write_text("".join(json.dumps({"custom_id": f"r{i}"}) + "\n" for i in range(lines)))
    return path


def ids(directory: Path, name: str) -> list[str | None]:
    return [json.loads(line)["custom_id"] for line in (directory / name).read_text().splitlines()]


class Answerer:
    """Answers in an order of its own, and counts."""

    def __init__(self, halt_after: int | None = None) -> None:
        self.calls: Counter[int] = Counter()
        self.most = self._now = 0
        self._halt_after = halt_after

    async def __call__(self, number: int, line: bytes) -> Answered:
        self.calls[number] += 1
        self._now += 1
        self.most = max(self.most, self._now)
        for _ in range(number % 5):
            await asyncio.sleep(0)
        self._now -= 1
        if self._halt_after is not None and len(self.calls) > self._halt_after:
            raise Halted("killed")
        return Answered(json.loads(line)["custom_id"], 200, {"n": number})


def run(path: Path, directory: Path, answer: jobs.Answer) -> Journal:
    async def go() -> Journal:
        journal = Journal(directory)
        try:
            await Job(path, examine(path), journal, answer, window=WINDOW).run()
        finally:
            await journal.close()
        return journal

    return asyncio.run(go())


def test_every_request_is_answered_once_and_few_at_a_time(tmp_path: Path) -> None:
    path, answer = write_input(tmp_path / "in"), Answerer()
    journal = run(path, tmp_path, answer)
    assert sorted(ids(tmp_path, OUTPUT), key=str) == sorted((f"r{i}" for i in range(LINES)), key=str)
    assert set(answer.calls.values()) == {1}
    assert answer.most <= WINDOW
    assert (journal.completed, journal.failed) == (LINES, 0)


def test_going_on_computes_what_was_in_flight_and_nothing_else(tmp_path: Path) -> None:
    path = write_input(tmp_path / "in")
    first = Answerer(halt_after=LINES // 2)
    with pytest.raises(Halted):
        run(path, tmp_path, first)
    done = len(ids(tmp_path, OUTPUT))
    assert LINES // 2 - WINDOW <= done <= LINES // 2
    with (tmp_path / OUTPUT).open("ab") as file:  # a write that was cut off
        file.write(line_of(LINES - 1, custom_id=f"r{LINES - 1}")[:-9])
    second = Answerer()
    run(path, tmp_path, second)
    assert Counter(ids(tmp_path, OUTPUT)) == Counter(f"r{i}" for i in range(LINES))
    assert len(second.calls) == LINES - done
    assert sum((first.calls + second.calls).values()) <= LINES + WINDOW
    third = Answerer()
    run(path, tmp_path, third)
    assert not third.calls


@settings(max_examples=30)
@given(st.integers(0, 300), st.integers(0, 60))
def test_a_journal_cut_anywhere_opens_with_its_whole_lines(cut: int, kept: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        lines = [line_of(i, custom_id="x" * (i % 7)) for i in range(6)]
        whole = b"".join(lines)
        (directory / OUTPUT).write_bytes(whole[:cut])
        (directory / ERRORS).write_bytes(line_of(9, custom_id="e") + b"x" * kept)
        journal = Journal(directory)
        asyncio.run(journal.close())
        expected = whole[:cut].count(b"\n")
        assert [i for i in range(10) if i in journal] == [*range(expected), 9]
        assert (directory / OUTPUT).read_bytes() == b"".join(lines[:expected])


def test_what_is_no_request_goes_to_the_error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LONGEST_LINE", 100)
    good = b'{"custom_id": "a"}'
    long = b'{"custom_id": "l", "x": "' + b"y" * 1000 + b'"}'
    (tmp_path / "in").write_bytes(
        b"\n".join([good, b"", b"{", long, b"\xff\xfe", good, b'{"custom_id": "z"}'])
    )

    async def answer(number: int, line: bytes) -> Answered:
        if b"custom_id" not in line:
            raise BadRequest("the line is no request")
        return Answered(json.loads(line)["custom_id"], 200, {})

    journal = run(tmp_path / "in", tmp_path, answer)
    assert ids(tmp_path, OUTPUT) == ["a", "z"]
    errors = [json.loads(line) for line in (tmp_path / ERRORS).read_text().splitlines()]
    told = {error["id"]: error["error"]["message"] for error in errors}
    assert told == {
        "batch_req_1": "the line is no request",
        "batch_req_2": "line 3 has more than 100 bytes",
        "batch_req_3": "the line is no request",
        "batch_req_4": "the custom_id 'a' was there before; each must be another",
    }
    assert {error["response"]["status_code"] for error in errors} == {400}
    assert (journal.completed, journal.failed) == (2, 4)


def test_a_request_that_fails_twice_goes_to_the_error_file(tmp_path: Path) -> None:
    path, calls = write_input(tmp_path / "in", 7), Counter[int]()

    async def answer(number: int, line: bytes) -> Answered:
        calls[number] += 1
        if number == 6:  # it was tried twice already
            raise AttemptsSpent("2 replicas died")
        if number == 2 or (number == 4 and calls[4] == 1):
            raise GangDied("worker 0 died")
        return Answered(f"r{number}", 200, {})

    run(path, tmp_path, answer)
    assert sorted(ids(tmp_path, OUTPUT), key=str) == ["r0", "r1", "r3", "r4", "r5"]
    errors = [json.loads(line) for line in (tmp_path / ERRORS).read_text().splitlines()]
    told = {error["custom_id"]: error["response"]["status_code"] for error in errors}
    assert told == {"r2": 500, "r6": 500}
    assert calls == {0: 1, 1: 1, 2: 2, 3: 1, 4: 2, 5: 1, 6: 1}


def test_a_disk_that_takes_no_more_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = write_input(tmp_path / "in")
    real = os.fsync

    async def go() -> None:
        journal = Journal(tmp_path)
        monkeypatch.setattr(os, "fsync", full)
        try:
            await Job(path, examine(path), journal, Answerer(), window=WINDOW).run()
        finally:
            monkeypatch.setattr(os, "fsync", real)
            await journal.close()

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(go())


def test_other_conditions_are_refused() -> None:
    check_same({"model": "a", "dtype": "b"}, {"dtype": "b", "model": "a"})
    with pytest.raises(Changed, match="begun with model 'a', and now it is 'c'"):
        check_same({"model": "a"}, {"model": "c"})


@given(st.lists(st.integers(0, 500)))
def test_bits_are_a_set(numbers: list[int]) -> None:
    bits = Bits()
    for number in numbers:
        bits.add(number)
    assert bits.count == len(set(numbers))
    assert [n for n in range(502) if n in bits] == sorted(set(numbers))


@given(st.lists(st.sampled_from("abcdefgh"), max_size=30))
def test_all_but_the_first_of_equal_ids_are_duplicates(names: list[str]) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(json.dumps({"custom_id": name}).encode() + b"\n" for name in names))
        file.flush()
        examined = examine(Path(file.name))
    expected = [i for i, name in enumerate(names) if name in names[:i]]
    assert [i for i in range(len(names)) if i in examined.duplicates] == expected
    assert examined.lines == len(names)
