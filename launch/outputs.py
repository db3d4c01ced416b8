"""Standard output and error whose reader has gone: from then on they go nowhere, else each write would raise."""

from __future__ import annotations

import os
import select
import sys
from typing import TextIO


def drop_if_gone(stream: TextIO) -> bool:
    """Whether nobody reads it any more, as after `| head` or when a terminal has hung up."""
    look = select.poll()
    look.register(stream, 0)
    gone = bool(look.poll(0))  # an error or a hang-up, which nobody need ask for
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return gone


def hung_up() -> None:
    """For who gets SIGHUP: our terminal may have gone."""
    for stream in (sys.stdout, sys.stderr):
        drop_if_gone(stream)
