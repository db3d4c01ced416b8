"""Whatever a batch's file holds, each of its lines ends in the output or the error file, once, and never as a 5xx."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.api.batches import COMPLETIONS, answerer
from launch.api.schemas import CompletionRequest
from orchestrator.jobs import LONGEST_LINE, Job, examine
from orchestrator.journal import ERRORS, OUTPUT, Journal
from tests.fakes import TalkingReplica
from tests.served_api import in_loop, says, served
from tests.unit.test_api_fuzz import VALUES, body_of

GOOD = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "x"}}
FIELD = st.sampled_from([*GOOD, "other"])
ODD = st.sampled_from(
    [
        b"\xff\xfe",
        b'{"custom_id": "\xc3\x28"}',
        b'{"custom_id": "\xed\xa0\x80", "method": "POST"}',
        b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}',
        b"[" * 5000,
        b'{"body":' * 3000,
        b"\0",
        b"\xef\xbb\xbf{}",
        b" \t ",
        b"",
        b"\r",
        json.dumps(GOOD).encode()[:-20],
    ]
)
LINES = st.lists(
    st.one_of(
        st.builds(
            lambda name, body: json.dumps({**GOOD, "custom_id": name, "body": body}).encode(),
            st.sampled_from("abc"),
            body_of(CompletionRequest),
        ),
        st.builds(lambda field, value: json.dumps({**GOOD, field: value}).encode(), FIELD, VALUES),
        st.builds(lambda value: json.dumps(value).encode(), VALUES),
        st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")),
        ODD,
    ),
    max_size=12,
)


async def answered(content: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Output, errors, and how many requests the file was found to hold."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "in").write_bytes(content)
        examined = examine(directory / "in")
        journal = Journal(directory)
        async with served(TalkingReplica(says("Hello"))) as api:
            job = Job(directory / "in", examined, journal, answerer(api.service, COMPLETIONS, ""), window=4)
            await job.run()
            assert api.coordinator.open_requests == 0
        await journal.close()
        found = [
            [json.loads(line) for line in (directory / name).read_bytes().splitlines()]
            for name in (OUTPUT, ERRORS)
        ]
        assert (journal.completed, journal.failed) == (len(found[0]), len(found[1]))
        return found[0], found[1], examined.lines


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_each_line_is_answered_or_refused_once(lines: list[bytes], end: bytes, is_whole: bool) -> None:
    content = end.join(lines) + (end if is_whole else b"")
    output, errors, count = asyncio.run(answered(content))
    assert count == sum(bool(line.strip()) for line in content.split(b"\n"))
    assert Counter(one["id"] for one in output + errors) == Counter(f"batch_req_{i}" for i in range(count))
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in output)
    assert all(400 <= one["response"]["status_code"] < 500 and one["error"]["message"] for one in errors)
    names = [one["custom_id"] for one in output]
    assert len(names) == len(set(names))


@in_loop
async def test_a_line_of_ten_megabytes_is_refused_and_its_neighbours_are_not() -> None:
    def line(name: str, prompt: str) -> bytes:
        return json.dumps({**GOOD, "custom_id": name, "body": {"prompt": prompt}}).encode() + b"\n"

    torn = line("torn", "x")[:-10]
    output, errors, count = await answered(
        line("a", "x") + line("long", "y" * 10 * 2**20) + line("b", "z") + torn
    )
    assert count == 4
    assert [one["custom_id"] for one in output] == ["a", "b"]
    (long, cut) = sorted(errors, key=lambda one: str(one["id"]))
    assert (long["id"], long["error"]["message"]) == (
        "batch_req_1",
        f"line 2 has more than {LONGEST_LINE} bytes",
    )
    assert cut["id"] == "batch_req_3"
    assert cut["error"]["message"].startswith("the line is no request of a batch: ")
