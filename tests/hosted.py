"""Small classes for gangs to host: light to import, so that a process that hosts one starts fast."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from cluster import stacks
from cluster.channel import Address, Reader, Via, Writer
from cluster.errors import BadLayout


class Parrot:
    """Does what a gang must be able to carry: answers, exceptions, waiting, dying in every way."""

    def __init__(self) -> None:
        self._released = threading.Event()

    def echo(self, value: object) -> object:
        return value

    def environment(self, names: Sequence[str]) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    def wait(self) -> str:
        """Blocks until another call releases it."""
        self._released.wait()
        return "released"

    def release(self) -> None:
        self._released.set()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=sys.stderr, flush=True)

    def complain(self) -> None:
        raise BadLayout("tp3 does not exist here. Use tp2.")

    def divide(self) -> float:
        return 1 / 0

    def quit(self) -> None:
        sys.exit(7)

    def exit(self, code: int, words: str) -> None:
        print(words, file=sys.stderr, flush=True)
        os._exit(code)

    def crash(self) -> None:
        ctypes.string_at(0)

    def signal(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class Stuck(Parrot):
    """Tells its stacks when it is asked."""

    def __init__(self) -> None:
        super().__init__()
        stacks.arm()

    def stacks(self) -> str:
        return stacks.own()

    def bustle(self, seconds: float) -> int:
        """→ how many threads came and went."""
        end_s, count = time.monotonic() + seconds, 0
        while time.monotonic() < end_s:
            thread = threading.Thread(target=str)
            thread.start()
            thread.join()
            count += 1
        return count

    def hog(self, seconds: float) -> None:
        """Keep Python's lock."""
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


class Unwilling:
    def __init__(self) -> None:
        raise BadLayout("no device for me")


class Talker:
    """One end of a channel in a process of its own."""

    def open_writer(self, readers: Sequence[Via], interface: str) -> list[Address]:
        self._writer = Writer.create(readers, interface=interface)
        return [self._writer.address(reader) for reader in range(len(readers))]

    def send(self, message: bytes, times: int = 1) -> None:
        for _ in range(times):
            self._writer.send(message)

    def open_reader(self, address: Address) -> None:
        self._reader = Reader.open(address)

    def recv(self, timeout_s: float) -> bytes | None:
        return self._reader.recv(timeout_s)

    def answer(self, timeout_s: float, times: int) -> None:
        """Read a message and send it on, as often as asked."""
        for _ in range(times):
            message = self._reader.recv(timeout_s)
            assert message is not None
            self._writer.send(message)

    def cpu_while_idle_s(self, timeout_s: float) -> float:
        """Processor time that a wait for nothing takes."""
        start_s = time.process_time()
        assert self._reader.recv(timeout_s) is None
        return time.process_time() - start_s
