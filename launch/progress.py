"""What is going on, on standard error: a bar where somebody looks, plain lines where a log is kept."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SAY_AGAIN_S = 10.0
BEGUN_S = time.monotonic()  # of the command, which imports this module first


def tell_torch() -> None:
    """Before it is imported: seconds, where the disk is cold or the machine busy. To who looks: what was asked wrongly
    is found after it too, and is one line in a log."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        Progress().say("importing torch")


class Bar(Protocol):
    def update(self, done: float, total: float) -> None: ...


class _Silent:
    def update(self, done: float, total: float) -> None:
        pass


class Progress:
    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty() and not quiet

    def say(self, line: str) -> None:
        """With the seconds since the command began."""
        if not self._quiet:
            elapsed_s = time.monotonic() - BEGUN_S
            print(f"· {elapsed_s:5.1f} s  {line}", file=sys.stderr, flush=True)

    @contextmanager
    def waiting(self, line: str) -> Iterator[None]:
        """Says what is waited for, and for how long by then, again and again: nothing where it is soon over."""
        begun_s, over = time.monotonic(), threading.Event()

        def say() -> None:
            while not over.wait(SAY_AGAIN_S):
                self.say(f"{line} … {time.monotonic() - begun_s:.0f} s")

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        try:
            yield
        finally:
            over.set()
            saying.join()

    @contextmanager
    def bar(self, line: str, *, unit_is_bytes: bool = True) -> Iterator[Bar]:
        """A bar on a terminal; elsewhere the line alone."""
        if not self._tty:
            self.say(line)
            yield _Silent()
            return
        from rich import progress as rich
        from rich.console import Console

        count = rich.DownloadColumn() if unit_is_bytes else rich.MofNCompleteColumn()
        columns = (
            rich.TextColumn("· {task.description}"),
            rich.BarColumn(),
            count,
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=Console(stderr=True)) as shown:
            task = shown.add_task(line, total=None)

            class Shown:
                def update(self, done: float, total: float) -> None:
                    shown.update(task, completed=done, total=total or None)

            yield Shown()
