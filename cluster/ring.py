"""A ring of bytes in shared memory: one writer, n readers on the same node, every reader gets every message.

    | token 16 | capacity 8 | readers 8 | … | written | … | read[0] | … | read[1] | … | bytes: capacity |

`written` and `read[i]` count bytes since the start, each in its own cache line; a byte's place is its count
modulo the capacity. A message is its length and its bytes, and flows through the ring as through a pipe, so
that one longer than the ring passes too. A reader that opens late loses nothing: the writer waits when the
ring is full.

Order: a counter is stored after the bytes it speaks of, and x86 makes stores visible in the order they were
made, loads likewise. Other machines may reorder them and Python has no fence: there `SUPPORTED` is false
and the channel uses sockets.

Sleep: whoever waits sleeps in the kernel on the counter it waits for (futex), and whoever moves a counter
wakes its sleepers. The kernel compares the counter again before it sleeps, so no wake-up is lost, and an
idle rank costs nothing: eight ranks on two cores do not take turns at spinning.

No leftovers: the memory has no name (memfd). Readers open it through /proc while the writer lives, and it
is gone with the last process that maps it, however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import hmac
import mmap
import os
import platform
import secrets
import struct
import time

from cluster.errors import GangDied

SUPPORTED = platform.system() == "Linux" and platform.machine() == "x86_64"

_SYS_FUTEX = 202  # x86_64: arch/x86/entry/syscalls/syscall_64.tbl
_FUTEX_WAIT, _FUTEX_WAKE = (
    0,
    1,
)  # include/uapi/linux/futex.h; not PRIVATE: the word is shared between processes
_EVERYONE = 2**31 - 1

_LINE = 8  # 64-bit words in a cache line of 64 bytes
_CAPACITY, _READERS, _WRITTEN = 2, 3, _LINE  # positions, in words
_TOKEN_BYTES = 16
_LENGTH = struct.Struct("<Q")
_LOW_32 = 0xFFFF_FFFF


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)


class _Memory:
    """The mapped file: counters, bytes, and sleeping on a counter."""

    def __init__(self, file: int, size: int) -> None:
        self._map = mmap.mmap(file, size)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        self._view = memoryview(self._map)
        self.words = self._view.cast("Q")
        self.bytes = self._view[_data_start(self.words[_READERS]) :]

    def advance(self, word: int, count: int) -> None:
        """Store a counter (one aligned 8-byte store) and wake who sleeps on it."""
        self.words[word] = count
        _libc.syscall(
            _SYS_FUTEX, ctypes.c_void_p(self._address + 8 * word), _FUTEX_WAKE, _EVERYONE, None, None, 0
        )

    def sleep(self, word: int, seen: int, deadline: float) -> bool:
        """Sleep until the counter differs from `seen`; False once `deadline` (time.monotonic) has passed.

        May return early. The kernel compares the low 32 bits, which cannot come round to the same value
        unseen: a ring is smaller than 4 GiB.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        pause = _Timespec(int(left_s), int(left_s % 1 * 1e9))
        address = ctypes.c_void_p(self._address + 8 * word)
        expected = ctypes.c_uint32(seen & _LOW_32)
        if _libc.syscall(_SYS_FUTEX, address, _FUTEX_WAIT, expected, ctypes.byref(pause), None, 0) == -1:
            code = ctypes.get_errno()
            if code not in (
                errno.EAGAIN,
                errno.EINTR,
                errno.ETIMEDOUT,
            ):  # moved already, a signal, the deadline
                raise OSError(code, os.strerror(code))
        return True

    def close(self) -> None:
        self.words.release()
        self.bytes.release()
        self._view.release()
        del self._anchor
        self._map.close()


class RingWriter:
    def __init__(self, readers: int, capacity_bytes: int) -> None:
        if not 0 < capacity_bytes < 2**32:
            raise ValueError(f"a ring of {capacity_bytes} bytes: it must hold 1 byte to 4 GiB")
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._file = os.memfd_create("shardwise-ring")
        self._capacity = capacity_bytes
        self._readers = [_read_word(reader) for reader in range(readers)]
        self._written = 0
        size = _data_start(readers) + capacity_bytes + -capacity_bytes % 8
        os.ftruncate(self._file, size)
        os.pwrite(self._file, self.token + struct.pack("<QQ", capacity_bytes, readers), 0)
        self._memory = _Memory(self._file, size)

    @property
    def path(self) -> str:
        """Where a process of this node opens the memory while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def send(self, message: bytes | bytearray | memoryview, timeout_s: float) -> None:
        """Raises GangDied, naming the reader, when the ring stays full for `timeout_s`; it is broken then."""
        frame = memoryview(b"".join((_LENGTH.pack(memoryview(message).nbytes), message)))
        deadline = time.monotonic() + timeout_s
        while frame:
            start = self._written % self._capacity
            size = min(len(frame), self._free(deadline, timeout_s), self._capacity - start)
            self._memory.bytes[start : start + size] = frame[:size]
            self._written += size
            self._memory.advance(_WRITTEN, self._written)
            frame = frame[size:]

    def _free(self, deadline: float, timeout_s: float) -> int:
        words = self._memory.words
        while True:
            slowest = min(self._readers, key=words.__getitem__)
            seen = words[slowest]
            if free := self._capacity - (self._written - seen):
                return free
            if not self._memory.sleep(slowest, seen, deadline):
                raise GangDied(
                    f"reader {self._readers.index(slowest)} on this node left {self._capacity} bytes unread "
                    f"for {timeout_s:g} s: it is stopped or dead"
                )

    def close(self) -> None:
        self._memory.close()
        os.close(self._file)


class RingReader:
    def __init__(self, path: str, token: bytes, reader: int) -> None:
        self._memory = _open(path, token)
        self._capacity = self._memory.words[_CAPACITY]
        self._word = _read_word(reader)
        self._read = self._memory.words[self._word]
        self._frame = bytearray()  # what has come of the message in flight, its length first

    def recv(self, timeout_s: float) -> bytes | None:
        """The next message; None when it has not come whole within `timeout_s`: call again to go on."""
        deadline = time.monotonic() + timeout_s
        while missing := self._missing():
            if not (available := self._available(deadline)):
                return None
            start = self._read % self._capacity
            size = min(missing, available, self._capacity - start)
            self._frame += self._memory.bytes[start : start + size]
            self._read += size
            self._memory.advance(self._word, self._read)
        message = bytes(memoryview(self._frame)[_LENGTH.size :])
        self._frame = bytearray()
        return message

    def _missing(self) -> int:
        have = len(self._frame)
        if have < _LENGTH.size:
            return _LENGTH.size - have
        return _LENGTH.size + int(_LENGTH.unpack_from(self._frame)[0]) - have

    def _available(self, deadline: float) -> int:
        """Bytes to read; sleeps until there are some; 0 at the deadline."""
        while not (available := self._memory.words[_WRITTEN] - self._read):
            if not self._memory.sleep(_WRITTEN, self._read, deadline):
                return 0
        return available

    def close(self) -> None:
        self._memory.close()


def _open(path: str, token: bytes) -> _Memory:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise GangDied(
            f"{path} cannot be opened ({error.strerror}): its writer has gone, or is in another container"
        ) from None
    try:
        if not hmac.compare_digest(os.pread(file, _TOKEN_BYTES, 0), token):
            raise GangDied(f"{path} is not the ring that the address speaks of: its writer has closed it")
        return _Memory(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def _read_word(reader: int) -> int:
    return (2 + reader) * _LINE


def _data_start(readers: int) -> int:
    return 8 * _read_word(readers)
