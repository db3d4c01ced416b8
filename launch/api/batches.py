"""/v1/batches: jobs that go on after their submitter has left, and after this server has been killed."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from cluster.errors import AttemptsSpent, BadRequest, ShardwiseError, UserError
from cluster.files import read_back
from launch.api.asking import Begun, all_of, terms_of
from launch.api.chat import begin_chat
from launch.api.completions import begin_completions
from launch.api.errors import ApiError, api_error, of_validation
from launch.api.files import FileStore
from launch.api.schemas import ChatRequest, CompletionRequest, Json, Name, Open
from launch.api.service import Service
from orchestrator.jobs import Answer, Answered, Changed, Examined, Halted, Job, check_same, examine
from orchestrator.journal import ERRORS, MANIFEST, OUTPUT, Journal, write_durably

LOG = logging.getLogger("shardwise")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DAY_S = 24 * 3600
_CHANGED = "conditions_changed"
_ID = re.compile(r"batch_[0-9a-f]{32}")
_OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_WINDOW = re.compile(r"(\d{1,4})([hd])")


class BatchRequest(Open):
    input_file_id: Name
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Name = "24h"
    metadata: Annotated[Json, Field(max_length=16)] | None = None


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Batches:
    """All that are known, and those that run."""

    def __init__(self, root: Path, files: FileStore, service: Service, conditions: Mapping[str, Any]) -> None:
        """`conditions` are what answers depend on: a job that was begun under others is not gone on with."""
        self._root, self._files, self._service = root, files, service
        self._conditions = dict(conditions)
        self._running: dict[str, tuple[asyncio.Task[None], Job | None]] = {}
        self._progress: dict[str, Journal] = {}

    def resume(self) -> None:
        """Go on with what was not finished when the server ended."""
        self._root.mkdir(parents=True, exist_ok=True)
        for directory in self._root.iterdir():
            if (told := self._known(directory.name)) is None:
                continue
            had_changed = told["errors"] is not None and told["errors"]["data"][0]["code"] == _CHANGED
            if had_changed:  # perhaps they have changed back
                self._update(directory.name, "validating", errors=None)
            if told["status"] in _OPEN or had_changed:
                self._start(directory.name)

    async def stop(self) -> None:
        """What is in flight ends; the rest waits for the next start."""
        for task, job in self._running.values():
            if job is not None:
                job.stop(drop=False)
            else:
                task.cancel()
        await asyncio.gather(*(task for task, _ in self._running.values()), return_exceptions=True)

    def create(self, asked: BatchRequest, owner: str) -> dict[str, Any]:
        self._files.get(asked.input_file_id, owner)
        window_s = _seconds(asked.completion_window)
        now = int(time.time())
        batch_id = f"batch_{uuid.uuid4().hex}"
        (self._root / batch_id).mkdir(parents=True)
        self._write(
            batch_id,
            {
                "id": batch_id,
                "object": "batch",
                "endpoint": asked.endpoint,
                "errors": None,
                "input_file_id": asked.input_file_id,
                "completion_window": asked.completion_window,
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "created_at": now,
                "in_progress_at": None,
                "expires_at": now + window_s,
                "finalizing_at": None,
                "completed_at": None,
                "failed_at": None,
                "expired_at": None,
                "cancelling_at": None,
                "cancelled_at": None,
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": asked.metadata,
                "owner": owner,
                "conditions": None,
            },
        )
        self._start(batch_id)
        return self.get(batch_id, owner)

    def get(self, batch_id: str, owner: str) -> dict[str, Any]:
        """Raises ApiError 404."""
        told = self._known(batch_id)
        if told is not None and told.pop("owner") == owner:
            del told["conditions"]
            if (journal := self._progress.get(batch_id)) is not None:
                told["request_counts"] |= {"completed": journal.completed, "failed": journal.failed}
            return told
        raise ApiError(404, f"there is no batch {batch_id[:60]!r}", param="batch_id", code="batch_not_found")

    def all(self, owner: str) -> list[dict[str, Any]]:
        """The newest first."""
        found = []
        for directory in self._root.iterdir():
            try:
                found.append(self.get(directory.name, owner))
            except ApiError:
                continue
        return sorted(found, key=lambda told: (told["created_at"], told["id"]), reverse=True)

    def cancel(self, batch_id: str, owner: str) -> dict[str, Any]:
        told = self.get(batch_id, owner)
        if told["status"] in _OPEN:
            self._update(batch_id, "cancelling")
            task, job = self._running.get(batch_id, (None, None))
            if job is not None:
                job.stop(drop=True)
            elif task is not None:
                task.cancel()
        return self.get(batch_id, owner)

    # -- inside --

    def _start(self, batch_id: str) -> None:
        self._running[batch_id] = asyncio.create_task(self._run(batch_id)), None

    async def _run(self, batch_id: str) -> None:
        told = self._read(batch_id)
        try:
            if told["status"] == "cancelling":  # as the last server ended
                await self._finish(batch_id, "cancelled", None)
                return
            await self._answer_all(batch_id, told)
        except Halted as error:
            LOG.warning("%s: %s", batch_id, error)
        except asyncio.CancelledError:
            if self._read(batch_id)["status"] == "cancelling":
                await self._finish(batch_id, "cancelled", None)
        except Changed as error:
            self._fail(batch_id, str(error), _CHANGED)
        except (ShardwiseError, OSError) as error:
            self._fail(batch_id, str(error))
        except Exception:  # ours to mend; the batch must not stay open for ever
            LOG.exception("%s failed", batch_id)
            self._fail(batch_id, "an error of ours; the server's log says more")
        finally:
            self._running.pop(batch_id, None)
            self._progress.pop(batch_id, None)

    async def _answer_all(self, batch_id: str, told: dict[str, Any]) -> None:
        path = self._files.data(told["input_file_id"], told["owner"])
        examined = await asyncio.to_thread(examine, path)
        conditions = {**self._conditions, "input": examined.sha256}
        if told["conditions"] is not None:
            check_same(told["conditions"], conditions)
        if not examined.lines:
            raise BadRequest("the input file holds no requests; give one JSON object a line")
        counts = {"total": examined.lines, "completed": 0, "failed": 0}
        self._update(batch_id, "in_progress", request_counts=counts, conditions=conditions, errors=None)
        journal = await asyncio.to_thread(Journal, self._root / batch_id)
        self._progress[batch_id] = journal
        job = self._job(path, examined, journal, told)
        self._running[batch_id] = self._running[batch_id][0], job
        timer = asyncio.get_running_loop().call_later(
            max(0.0, told["expires_at"] - time.time()), self._expire, batch_id, job
        )
        try:
            await job.run()
        finally:
            timer.cancel()
            await journal.close()
        status = self._read(batch_id)["status"]
        done = journal.completed + journal.failed
        if status == "cancelling":
            await self._finish(batch_id, "cancelled", journal)
        elif told["expires_at"] <= time.time() and done < examined.lines:
            await self._finish(batch_id, "expired", journal)
        elif done == examined.lines:
            self._update(batch_id, "finalizing")
            await self._finish(batch_id, "completed", journal)

    def _job(self, path: Path, examined: Examined, journal: Journal, told: Mapping[str, Any]) -> Job:
        coordinator = self._service.coordinator
        # Twice what the replicas run: prompts are encoded and lines written while others are computed.
        window = 2 * coordinator.limits.max_num_seqs * len(coordinator.replicas_alive)
        answer = answerer(self._service, told["endpoint"], told["owner"])
        return Job(path, examined, journal, answer, window=window)

    def _expire(self, batch_id: str, job: Job) -> None:
        LOG.warning("%s: its completion window is over", batch_id)
        job.stop(drop=True)

    async def _finish(self, batch_id: str, status: str, journal: Journal | None) -> None:
        directory, told = self._root / batch_id, self._read(batch_id)
        changes: dict[str, Any] = {}
        for field, name in (("output_file_id", OUTPUT), ("error_file_id", ERRORS)):
            path = directory / name
            if told[field] is None and path.is_file() and path.stat().st_size:
                shown = f"{batch_id}_{name}"
                changes[field] = await asyncio.to_thread(self._files.adopt, path, shown, told["owner"])
        if journal is not None:
            counts = {"completed": journal.completed, "failed": journal.failed}
            changes["request_counts"] = {**told["request_counts"], **counts}
        self._update(batch_id, status, **changes)

    def _fail(self, batch_id: str, message: str, code: str = "failed") -> None:
        errors = {
            "object": "list",
            "data": [{"code": code, "message": message, "line": None, "param": None}],
        }
        self._update(batch_id, "failed", errors=errors)

    def _update(self, batch_id: str, status: str, **changes: Any) -> None:
        """With the time at which it came to this."""
        at = {f"{status}_at": int(time.time())} if status != "validating" else {}
        self._write(batch_id, {**self._read(batch_id), "status": status, **at, **changes})

    def _known(self, batch_id: str) -> dict[str, Any] | None:
        """None where there is no such batch, or its manifest is damaged: then its answers stay where they are."""
        if not _ID.fullmatch(batch_id):
            return None
        return read_back(self._root / batch_id / MANIFEST, dict[str, Any])

    def _read(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode((self._root / batch_id / MANIFEST).read_bytes())
        return found

    def _write(self, batch_id: str, told: Mapping[str, Any]) -> None:
        write_durably(self._root / batch_id / MANIFEST, told)


def _seconds(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * (3600 if found[2] == "h" else DAY_S) if found else 0
    if not 0 < seconds <= 30 * DAY_S:
        raise BadRequest(
            f"completion_window is {window[:40]!r}; it must be hours or days, such as 24h, up to 30d"
        )
    return seconds


def answerer(service: Service, endpoint: str, client: str) -> Answer:
    """What answers a line of a batch file, as the endpoint would."""

    async def answer(number: int, line: bytes) -> Answered:
        custom_id: str | None = None
        try:
            asked = _parse(line)
            custom_id = asked.custom_id
            if asked.method != "POST" or asked.url != endpoint:
                raise BadRequest(
                    f"method and url are {asked.method} {asked.url}; this batch is POST {endpoint}"
                )
            begun = await _begin(asked, service, endpoint, client)
            return Answered(custom_id, 200, begun.whole(await all_of(begun)))
        except (ApiError, UserError) as error:
            told = api_error(error)
        except ValidationError as error:
            told = of_validation(error.errors())
        except ShardwiseError as error:
            if service.coordinator.is_lost and not isinstance(error, AttemptsSpent):
                raise Halted(
                    "no replica is alive; the batch goes on once the server is started again"
                ) from None
            raise
        return Answered(custom_id, told.status, msgspec.json.decode(told.body))

    return answer


def _parse(line: bytes) -> _Line:
    try:
        return msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the line is no request of a batch: {str(error)[:200]}") from None


async def _begin(asked: _Line, service: Service, endpoint: str, client: str) -> Begun:
    if endpoint == CHAT:
        chat = ChatRequest.model_validate_json(bytes(asked.body))
        return await begin_chat(chat, service, terms_of(chat, service, client, is_batch=True))
    text = CompletionRequest.model_validate_json(bytes(asked.body))
    return await begin_completions(text, service, terms_of(text, service, client, is_batch=True))


def add_batches(app: FastAPI, batches: Batches) -> None:
    @app.post("/v1/batches")
    async def create(request: Request, asked: BatchRequest) -> Response:
        return _json(batches.create(asked, request.state.client))

    @app.get("/v1/batches")
    async def listed(
        request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str = ""
    ) -> Response:
        every = batches.all(request.state.client)
        first = next((i for i, one in enumerate(every, 1) if one["id"] == after), 0)
        page = every[first : first + limit]
        has_more = first + limit < len(every)
        return _json({"object": "list", "data": page, "has_more": has_more})

    @app.get("/v1/batches/{batch_id}")
    async def described(request: Request, batch_id: str) -> Response:
        return _json(batches.get(batch_id, request.state.client))

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancelled(request: Request, batch_id: str) -> Response:
        return _json(batches.cancel(batch_id, request.state.client))


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
