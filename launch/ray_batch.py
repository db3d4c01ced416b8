"""A thin client of a cluster's deployment by Ray's client (ray://): chunks go up, cursor by cursor things come down.

It has the methods of launch/batch_client.py, and what answers is the same API: launch/gateway.py asks it on the head.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import GangDied, UserError
from launch.batch_client import ServerGone, check_version
from launch.head import adopt, check_head, client_address, own_token

if TYPE_CHECKING:
    from cluster.detached import Detached
    from launch.progress import Progress

CHUNK_BYTES = 2 * 2**20  # of a file, in one call: Ray's client sends it whole
CALL_S = 60.0
_ATTEMPTS, _PAUSE_S = 5, 1.0  # of an upload whose actor is starting again


class RayBatchClient:
    """Satisfies launch.batch_client.Server. To be closed."""

    def __init__(self, address: str, name: str | None, dashboard: str | None, progress: Progress) -> None:
        """`name` of the deployment; None: the only one. Raises UserError or PlacementFailed, in seconds."""
        self.address, token = client_address(address), own_token()
        if unknown := check_head(self.address, dashboard, token):
            progress.say(unknown)
        adopt(token)
        progress.say(f"connecting to {self.address}")
        from cluster import detached

        with ExitStack() as owned:
            owned.enter_context(detached.joined(self.address))
            self._actor = _only(name, detached.names(), self.address)
            self._owned = owned.pop_all()

    def close(self) -> None:
        self._owned.close()

    def check(self, version: str) -> None:
        """Whether it is of our version. Raises UserError."""
        told = self._call("describe")
        check_version(f"{self._actor.name} in {self.address}", str(told["version"]), version)

    def get(self, path: str) -> dict[str, Any]:
        return self._answered("get", path)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._answered("post", path, dict(body))

    def upload(self, path: Path) -> str:
        """→ the file's id."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._upload(path)
            except ServerGone:
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(_PAUSE_S)
        raise AssertionError("unreachable")

    def download(self, file_id: str, to: Path) -> None:
        with to.open("wb") as file:
            while piece := self._call("piece", file_id, file.tell()):
                file.write(piece)

    def _upload(self, path: Path) -> str:
        upload, offset = uuid.uuid4().hex, 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                offset = self._call("append", upload, offset, chunk)
        if not offset:
            raise UserError(f"{path} is empty; give a file with a request a line")
        return str(self._call("finish", upload))

    def _answered(self, method: str, *args: object) -> dict[str, Any]:
        found: dict[str, Any] = self._call(method, *args)
        if "gone" in found:
            raise ServerGone(found["gone"])
        return found

    def _call(self, method: str, *args: object) -> Any:
        """Raises ServerGone where the actor is starting again."""
        try:
            return self._actor.call(method, *args, timeout_s=CALL_S)
        except GangDied as error:
            raise ServerGone(str(error)) from None


def _only(name: str | None, names: list[str], address: str) -> Detached:
    from cluster import detached

    told = ", ".join(names) or "nothing"
    if name is None and len(names) != 1:
        raise UserError(
            f"up in {address}: {told}; " + ("say which: --name" if names else "shardwise up RECIPE first")
        )
    found = detached.find(name or names[0])
    if found is None:
        raise UserError(f"{name} is not up in {address}; up there: {told}")
    return found
