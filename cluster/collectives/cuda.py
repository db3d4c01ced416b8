"""CUDA without its toolkit: source compiled by NVRTC, which torch's wheel brings, and the driver's calls by ctypes.

Every call is of the driver's or of NVRTC's documented interface, and is made for the thread's current device.
A call that fails raises RuntimeError with its name and the driver's words; a missing library, OSError.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from cluster.collectives import nvrtc

if TYPE_CHECKING:
    Argument: TypeAlias = ctypes._CDataType  # of a kernel

CHILDREN = 12  # that compile at once, some 0.5 s and 0.1 GB each
IPC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE, cuda.h
_HOST_REGISTER = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_WAIT_VALUE_GEQ, _WRITE_VALUE_DEFAULT = 0, 0  # CU_STREAM_WAIT_VALUE_GEQ; with a barrier for what came before
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PREFERRED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_SHARED_OF_PROCESSOR = 81  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
_RESERVED_SHARED = 1024  # of each block, by CUDA
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_FLOAT16, _BFLOAT16
_SWIZZLE_128B, _PROMOTE_256B = 3, 3  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_IPC_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", c_char * IPC_HANDLE_BYTES)]


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: 8 bytes for the id, and a union of 64."""

    _fields_ = [("id", c_int), ("_padding", c_int), ("value", c_uint * 3), ("_rest", c_char * 52)]


class TensorMap(ctypes.Structure):
    """CUtensorMap of cuda.h: how a kernel copies boxes of a tensor to its shared memory."""

    _fields_ = [("bytes", c_char * 128)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("blocks", c_uint * 3),
        ("threads", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_LaunchAttribute)),
        ("attribute_count", c_uint),
    ]


_DRIVER_CALLS = {
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuCtxSynchronize": (),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuIpcGetMemHandle": (POINTER(_IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), _IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamWaitValue32_v2": (c_void_p, c_uint64, c_uint, c_uint),
    "cuStreamWriteValue32_v2": (c_void_p, c_uint64, c_uint, c_uint),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernelEx": (POINTER(_LaunchConfig), c_void_p, POINTER(c_void_p), c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuOccupancyMaxActiveClusters": (POINTER(c_int), c_void_p, POINTER(_LaunchConfig)),
    "cuTensorMapEncodeTiled": (
        *(c_void_p, c_int, c_uint, c_uint64),
        *(POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint), POINTER(c_uint)),
        *(c_int, c_int, c_int, c_int),
    ),
}


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in _DRIVER_CALLS.items():
        getattr(library, name).argtypes = types
    return library


def _call(name: str, *arguments: object) -> None:
    error = getattr(_driver(), name)(*arguments)
    if error:
        words = c_char_p()
        _driver().cuGetErrorString(error, byref(words))
        raise RuntimeError(f"{name}: {(words.value or b'unknown error').decode()} ({error})")


def pci_address() -> str:
    """Of the current device, as Linux's sysfs writes it: `0000:01:00.0`."""
    device, text = c_int(), ctypes.create_string_buffer(32)
    _call("cuCtxGetDevice", byref(device))
    _call("cuDeviceGetPCIBusId", text, len(text), device)
    return text.value.decode().lower()


def _shared_of_processor() -> int:
    """Bytes that blocks of the current device's processors may have at once."""
    device, n_bytes = c_int(), c_int()
    _call("cuCtxGetDevice", byref(device))
    _call("cuDeviceGetAttribute", byref(n_bytes), _SHARED_OF_PROCESSOR, device)
    return n_bytes.value


# -- memory: addresses are the device's, as integers --


def allocate(n_bytes: int, filled_with: int) -> int:
    """Device memory that other processes may be given, of such bytes. It lives as long as this process."""
    address = c_uint64()
    _call("cuMemAlloc_v2", byref(address), n_bytes)
    _call("cuMemsetD8_v2", address, filled_with, n_bytes)
    _call("cuCtxSynchronize")
    return address.value


def export(address: int) -> bytes:
    """What another process of this host needs to `open_exported` the memory."""
    handle = _IpcHandle()
    _call("cuIpcGetMemHandle", byref(handle), address)
    return bytes(handle)


def open_exported(handle: bytes) -> int:
    """Another process's device memory, over peer access if it lies on another device."""
    address = c_uint64()
    exported = _IpcHandle.from_buffer_copy(handle)
    _call("cuIpcOpenMemHandle_v2", byref(address), exported, _IPC_LAZY_PEER_ACCESS)
    return address.value


def close_exported(address: int) -> None:
    _call("cuIpcCloseMemHandle", address)


def register_host(host_address: int, n_bytes: int) -> int:
    """Host memory that kernels may then use, at the address returned."""
    _call("cuMemHostRegister_v2", host_address, n_bytes, _HOST_REGISTER)
    address = c_uint64()
    _call("cuMemHostGetDevicePointer_v2", byref(address), host_address, 0)
    return address.value


def unregister_host(host_address: int) -> None:
    _call("cuMemHostUnregister", host_address)


# -- copies and waits of a stream (cudaStream_t as an integer) --


def copy(to: int, source: int, n_bytes: int, stream: int) -> None:
    """By a copy engine: between devices, or a device and memory of the host that is registered."""
    _call("cuMemcpyAsync", to, source, n_bytes, stream)


def wait_for_number(stream: int, address: int, number: int) -> None:
    """The stream waits, on no processor, until what is there has come to `number`, counted in a ring of 32 bits."""
    _call("cuStreamWaitValue32_v2", stream, address, number, _WAIT_VALUE_GEQ)


def write_number(stream: int, address: int, number: int) -> None:
    """Once all before it on the stream is done, and to be seen by whoever sees the number."""
    _call("cuStreamWriteValue32_v2", stream, address, number, _WRITE_VALUE_DEFAULT)


# -- kernels --


class Kernel:
    """A function of a loaded module. The module stays loaded as long as the process lives."""

    def __init__(
        self, module: c_void_p, name: str, shared_bytes: int = 0, at_once: int | None = None
    ) -> None:
        """`shared_bytes`: of dynamic shared memory that each block gets.

        `at_once`: so many blocks of a processor have their shared memory, and all else of it is to be L1, where loads
        on their way have room. Without it a processor stays as a kernel before left it.
        """
        self._function, self._shared_bytes = c_void_p(), shared_bytes
        _call("cuModuleGetFunction", byref(self._function), module, name.encode())
        if shared_bytes:
            _call("cuFuncSetAttribute", self._function, _MOST_DYNAMIC_SHARED, shared_bytes)
        if at_once is not None:
            wanted = at_once * (shared_bytes + _RESERVED_SHARED)
            percent = min(100, -(-100 * wanted // _shared_of_processor()))
            _call("cuFuncSetAttribute", self._function, _PREFERRED_CARVEOUT, percent)

    def launch(
        self, blocks: int, threads: int, stream: int, *arguments: ctypes._CDataType, overlap: bool
    ) -> None:
        """On `stream` (cudaStream_t as an integer), which may be capturing: the arguments are copied.

        `overlap`: it may start before its predecessor on the stream has ended, so it must wait for that itself.
        Needs compute capability 9.0 (CUDA programming guide, programmatic dependent launch).
        """
        pointers = (c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
        attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=(1, 0, 0))
        config = self._config(blocks, threads, stream, attribute, int(overlap))
        _call("cuLaunchKernelEx", byref(config), self._function, pointers, None)

    def clusters_at_once(self, blocks: int, threads: int, cluster: int) -> int:
        """How many clusters of so many blocks the idle device runs at the same time, of a grid of `blocks`."""
        most = c_int()
        attribute = _LaunchAttribute(id=_CLUSTER_DIMENSION, value=(cluster, 1, 1))
        config = self._config(blocks, threads, 0, attribute, 1)
        _call("cuOccupancyMaxActiveClusters", byref(most), self._function, byref(config))
        return most.value

    def _config(
        self, blocks: int, threads: int, stream: int, attribute: _LaunchAttribute, attributes: int
    ) -> _LaunchConfig:
        shape = (blocks, 1, 1), (threads, 1, 1)
        return _LaunchConfig(*shape, self._shared_bytes, stream, ctypes.pointer(attribute), attributes)


def tensor_map(
    base: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> TensorMap:
    """Of 16-bit floats, the first dimension contiguous; what lies outside of it counts as zero.

    Strides of the other dimensions in elements. A box's rows, of 128 bytes, are swizzled by 128 bytes.
    """
    rank = len(sizes)
    room = ctypes.create_string_buffer(128 + 64)
    address = (ctypes.addressof(room) + 63) & ~63  # the driver wants it so
    _call(
        "cuTensorMapEncodeTiled",
        *(address, _MAP_TYPES[base.dtype], rank, base.data_ptr(), (c_uint64 * rank)(*sizes)),
        (c_uint64 * (rank - 1))(*[stride * base.element_size() for stride in strides]),
        *((c_uint * rank)(*box), (c_uint * rank)(*[1] * rank), 0, _SWIZZLE_128B, _PROMOTE_256B, 0),
    )
    return TensorMap.from_buffer_copy(ctypes.string_at(address, 128))


def load(binary: bytes) -> c_void_p:
    """A module with `compile_source`'s binary, on the current device."""
    module = c_void_p()
    _call("cuModuleLoadData", byref(module), binary)
    return module


def compile_source(source: str, architecture: str, defines: dict[str, int]) -> bytes:
    """CUDA C++ → the binary for `architecture` ("sm_90"). Raises RuntimeError with the compiler's log."""
    try:
        return nvrtc.compile_text(_nvrtc(), source.encode(), _options(architecture, defines))
    except RuntimeError as error:
        raise RuntimeError(f"NVRTC for {architecture}: {error}") from None


def compile_sources(sources: Sequence[str], architecture: str) -> list[bytes]:
    """The same of many, each in a process of its own: NVRTC compiles one at a time in a process."""
    command = [sys.executable, "-S", nvrtc.__file__, nvrtc.where(_nvrtc()), *_options(architecture, {})]

    def compiled(source: str) -> bytes:
        child = subprocess.run(command, input=source.encode(), capture_output=True)
        if child.returncode:
            raise RuntimeError(f"NVRTC for {architecture}: {child.stderr.decode().strip()}")
        return child.stdout

    with ThreadPoolExecutor(CHILDREN) as pool:
        return list(pool.map(compiled, sources))


def _options(architecture: str, defines: dict[str, int]) -> list[str]:
    named = [f"-D{name}={value}" for name, value in defines.items()]
    return [f"--gpu-architecture={architecture}", "--std=c++17", *named]


@cache
def _nvrtc() -> ctypes.CDLL:
    """The NVRTC of torch's CUDA: on the loader's path, or in NVIDIA's wheels, which torch requires."""
    name = f"libnvrtc.so.{(torch.version.cuda or '13').split('.')[0]}"
    try:
        return nvrtc.opened(name)
    except OSError:
        wheels = find_spec("nvidia")
        folders = (wheels.submodule_search_locations if wheels else None) or []
        for library in (path for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{name}"))):
            return nvrtc.opened(str(library))
        raise
