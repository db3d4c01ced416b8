"""Which shardwise this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def our_version() -> str:
    try:
        return version("shardwise")
    except PackageNotFoundError:  # run from its source
        return "0.0.0"
