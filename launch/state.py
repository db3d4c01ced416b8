"""Where what outlives a command is kept: $XDG_STATE_HOME/shardwise."""

from __future__ import annotations

import os
from pathlib import Path


def state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "shardwise"


def up_directory(name: str) -> Path:
    """Of a deployment that was brought up from this machine."""
    return state_directory() / "up" / name


def coordinator_directory(name: str) -> Path:
    """Of one that an actor on this machine keeps."""
    return state_directory() / "coordinators" / name
