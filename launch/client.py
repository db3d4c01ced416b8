"""Batches from Python, by HTTP or by Ray's client:

from launch.client import Client

with Client("ray://head:10001") as client:
    job = client.submit(["Why is the sky blue?"], max_tokens=64)
    client.wait(job)
    for answer in client.results(job):
        print(answer["custom_id"], answer["response"]["body"])
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import BadRequest
from launch.batch import ADDRESS
from launch.batch_client import Server, open_server
from launch.batch_follow import OVER, follow, submit
from launch.batch_input import Source
from launch.progress import Progress

Row = str | Mapping[str, Any]  # a prompt; or messages or a prompt with sampling fields; or a line of OpenAI's


class Client:
    def __init__(
        self,
        address: str = ADDRESS,
        *,
        api_key: str | None = None,
        name: str | None = None,
        dashboard: str | None = None,
        progress: bool = False,
    ) -> None:
        """`address`: http://, https:// or ray://; a key is HTTP's alone, default OPENAI_API_KEY. `name` of the
        deployment and `dashboard`, the cluster's HTTP port, are Ray's. Raises UserError in 2 s where it cannot be.
        """
        self._progress = Progress(quiet=not progress)
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._server: Server = open_server(address, key, name, dashboard, self._progress)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.close()

    def submit(
        self,
        requests: Path | str | Iterable[Row],
        *,
        column: str | None = None,
        chat: bool = False,
        **sampling: Any,
    ) -> str:
        """→ the job's id. A file's path, or requests themselves. Raises UserError.

        `column` of a table holds the prompts; `chat`: prompts are users' messages; `sampling` for requests that say
        nothing themselves.
        """
        if isinstance(requests, Path | str):
            return str(
                submit(self._server, Source(Path(requests), column, chat, sampling), self._progress)["id"]
            )
        with tempfile.TemporaryDirectory(prefix="shardwise-batch-") as directory:
            path = Path(directory, "rows.jsonl")
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(_row(row)) + "\n" for row in requests)
            return str(submit(self._server, Source(path, None, chat, sampling), self._progress)["id"])

    def status(self, job: str) -> dict[str, Any]:
        """OpenAI's batch object."""
        return self._server.get(f"/v1/batches/{job}")

    def wait(self, job: str) -> dict[str, Any]:
        """Until it is over. A server that has gone is waited for: the job goes on when it is back."""
        return dict(follow(self._server, job, self._progress))

    def results(self, job: str) -> Iterator[dict[str, Any]]:
        """Lines of the output, then those of the error file, in the order in which they were done."""
        batch = self.status(job)
        if batch["status"] not in OVER:
            raise BadRequest(f"batch {job} is {batch['status']}; wait for it")
        with tempfile.TemporaryDirectory(prefix="shardwise-batch-") as directory:
            for field in ("output_file_id", "error_file_id"):
                if batch[field] is not None:
                    path = Path(directory, field)
                    self._server.download(batch[field], path)
                    with path.open("rb") as file:
                        yield from map(json.loads, file)

    def cancel(self, job: str) -> dict[str, Any]:
        return self._server.post(f"/v1/batches/{job}/cancel", {})

    def list(self) -> Iterator[dict[str, Any]]:
        """The newest first."""
        after = ""
        while True:
            page = self._server.get(f"/v1/batches?limit=100&after={after}")
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1]["id"]


def _row(row: Row) -> Mapping[str, Any]:
    return {"prompt": row} if isinstance(row, str) else row
