"""A command that ends with who started it: `python -m launch.bound PARENT_PID COMMAND …`, for launch/keeper.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h


def bound(parent: int) -> None:
    """From now on this process is killed when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        sys.exit(1)


def main(parent: int, argv: list[str]) -> int:
    bound(parent)
    from launch.__main__ import main as shardwise

    return shardwise(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
