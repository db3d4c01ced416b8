"""NVRTC by ctypes alone. It compiles one source at a time in a process, so this file is also a program:

python nvrtc.py LIBRARY OPTION… < SOURCE > BINARY      (exit 1, and the compiler's log on standard error)
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_char_p, c_size_t, c_void_p
from pathlib import Path


def opened(library: str) -> ctypes.CDLL:
    """NVRTC, and what it loads by name once it compiles: NVIDIA's wheels have that beside it, where no loader looks."""
    nvrtc = ctypes.CDLL(library)
    for builtins in sorted(Path(where(nvrtc)).parent.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins))
    return nvrtc


def where(library: ctypes.CDLL) -> str:
    """The file that was loaded: another process may not find it by its name."""
    with open("/proc/self/maps") as maps:
        loaded = (line[line.index("/") :].strip() for line in maps if "/" in line)
        return next((path for path in loaded if Path(path).name.startswith("libnvrtc.so")), library._name)


def compile_text(nvrtc: ctypes.CDLL, source: bytes, options: list[str]) -> bytes:
    """CUDA C++ → a binary for the `--gpu-architecture` of the options. Raises RuntimeError with the compiler's log."""
    program = c_void_p()
    _check(nvrtc.nvrtcCreateProgram(byref(program), source, b"source.cu", 0, None, None))
    try:
        argv = (c_char_p * len(options))(*[option.encode() for option in options])
        if nvrtc.nvrtcCompileProgram(program, len(options), argv):
            raise RuntimeError(_text(nvrtc, "ProgramLog", program).rstrip(b"\0\n").decode())
        return _text(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _text(nvrtc: ctypes.CDLL, what: str, program: c_void_p) -> bytes:
    size = c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"NVRTC: error {error}")


def main() -> int:
    library, *options = sys.argv[1:]
    try:
        binary = compile_text(opened(library), sys.stdin.buffer.read(), options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
