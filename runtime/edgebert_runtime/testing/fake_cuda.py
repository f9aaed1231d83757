"""A CUDA driver without a GPU, which keeps account and raises where a GPU would go wrong.

It has the functions of ``cuda.bindings.driver`` that ``edgebert_runtime.cuda`` calls. Work on a
stream is done when somebody waits for it, not before: who reads a result too early reads what was
there, and who frees memory too early is told so. GPU memory has addresses that nothing else has.
"""

from __future__ import annotations

import enum
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FakeDriver", "Misuse", "StreamState"]

_FIRST_ADDRESS = 0x7_0000_0000_0000
_GUARD_BYTES = 4096


class Misuse(BaseException):  # what a test is to find; nobody may handle it
    """Something was done that on a GPU would give wrong results, or crash."""


class Status(enum.IntEnum):
    """``CUresult``."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Attribute(enum.Enum):
    """``CUdevice_attribute``."""

    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CaptureMode(enum.Enum):
    """``CUstreamCaptureMode``."""

    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class StreamState:
    """A stream: work that waits, or that is being recorded."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.waiting: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.syncs = 0

    def enqueue(self, work: Callable[[], None]) -> None:
        """Takes in work, or records it."""
        (self.waiting if self.recording is None else self.recording).append(work)

    def finish(self) -> None:
        """Does what waits."""
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()
        self.syncs += 1


class FakeDriver:
    """One GPU that is not there.

    Args:
        name: Of the GPU.
        compute_capability: Major and minor.
        cuda: The newest CUDA that the driver supports.
        integrated: Whether it shares the processor's memory.
        memory_bytes: Of the GPU; what goes beyond fails as on a full one.
        gpus: How many there are: 0 or 1.

    Attributes:
        calls: How often each function was called.
        live: How much of each kind is allocated and not freed.
    """

    CUdevice_attribute = Attribute
    CUstreamCaptureMode = CaptureMode

    def __init__(
        self,
        *,
        name: str = "Fake GPU",
        compute_capability: tuple[int, int] = (8, 7),
        cuda: tuple[int, int] = (12, 6),
        integrated: bool = True,
        memory_bytes: int = 8 * 2**30,
        gpus: int = 1,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.live: Counter[str] = Counter()
        self._name = name
        self._capability = compute_capability
        self._cuda = cuda
        self._integrated = integrated
        self._memory_bytes = memory_bytes
        self._gpus = gpus
        self._device: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, StreamState] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._addresses = _FIRST_ADDRESS
        self._handles = itertools.count(0x1000)
        self._current = threading.local()
        self._faults: dict[str, list[int]] = {}

    def fail(self, function: str, *, after: int = 0, status: int = 2) -> None:
        """Lets the call of a function fail that follows ``after`` more that work."""
        self._faults[function] = [after, status]

    # Memory, as the fake TensorRT and the tests see it.

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        """Returns GPU memory as ``uint8[size]``, which can be written to.

        Raises:
            Misuse: It was freed, or never allocated.
        """
        for start, block in self._device.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise Misuse(f"{size} bytes of GPU memory at {address:#x} are not allocated, or were freed")

    def stream(self, handle: Any) -> StreamState:
        """Returns the stream of a handle.

        Raises:
            Misuse: It was destroyed.
        """
        try:
            return self._streams[int(handle)]
        except KeyError:
            raise Misuse(f"stream {int(handle):#x} was destroyed") from None

    def _host(self, address: int, size: int) -> NDArray[np.uint8]:
        for start, block in self._pinned.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise Misuse("an asynchronous copy needs pinned memory that is not freed")

    def _begin(self, function: str, *, needs_context: bool = True) -> Status:
        self.calls[function] += 1
        fault = self._faults.get(function)
        if fault is not None:
            if fault[0] == 0:
                del self._faults[function]
                return Status(fault[1])
            fault[0] -= 1
        if needs_context and not getattr(self._current, "stack", []):
            return Status.CUDA_ERROR_INVALID_CONTEXT
        return Status.CUDA_SUCCESS

    def _refuse_while_recording(self) -> Status:
        recording = any(stream.recording is not None for stream in self._streams.values())
        return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED if recording else Status.CUDA_SUCCESS

    # What cuda.bindings.driver has. Each returns its status first.

    def cuGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.CUDA_SUCCESS, status.name.encode()

    def cuInit(self, flags: int) -> tuple[Status]:
        status = self._begin("cuInit", needs_context=False)
        return (status if status or self._gpus else Status.CUDA_ERROR_NO_DEVICE,)

    def cuDriverGetVersion(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self._cuda[0] * 1000 + self._cuda[1] * 10

    def cuDeviceGetCount(self) -> tuple[Status, int]:
        return self._begin("cuDeviceGetCount", needs_context=False), self._gpus

    def cuDeviceGet(self, ordinal: int) -> tuple[Status, int]:
        return self._begin("cuDeviceGet", needs_context=False), ordinal

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Status, bytes]:
        status = self._begin("cuDeviceGetName", needs_context=False)
        return status, self._name.encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: Attribute, device: int) -> tuple[Status, int]:
        values = {
            Attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED: int(self._integrated),
            Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self._capability[0],
            Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self._capability[1],
        }
        return self._begin("cuDeviceGetAttribute", needs_context=False), values[attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, int]:
        status = self._begin("cuDevicePrimaryCtxRetain", needs_context=False)
        self.live["contexts"] += status == 0
        return status, 0xC0

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Status]:
        if getattr(self._current, "stack", []):
            raise Misuse("the context is released while it is current")
        self.live["contexts"] -= 1
        return (self._begin("cuDevicePrimaryCtxRelease", needs_context=False),)

    def cuCtxPushCurrent(self, context: int) -> tuple[Status]:
        status = self._begin("cuCtxPushCurrent", needs_context=False)
        if self.live["contexts"] < 1:
            raise Misuse("the context was released")
        if status == 0:
            self._current.stack = [*getattr(self._current, "stack", []), context]
        return (status,)

    def cuCtxPopCurrent(self) -> tuple[Status, int]:
        status = self._begin("cuCtxPopCurrent")
        context = self._current.stack.pop() if status == 0 else 0
        return status, context

    def cuMemGetInfo(self) -> tuple[Status, int, int]:
        used = sum(len(block) for block in self._device.values())
        return self._begin("cuMemGetInfo"), self._memory_bytes - used, self._memory_bytes

    def cuMemAlloc(self, size: int) -> tuple[Status, int]:
        status = self._begin("cuMemAlloc") or self._refuse_while_recording()
        used = sum(len(block) for block in self._device.values())
        if status == 0 and used + size > self._memory_bytes:
            status = Status.CUDA_ERROR_OUT_OF_MEMORY
        if status:
            return Status(status), 0
        address = self._addresses
        self._addresses += -(-size // 512) * 512 + _GUARD_BYTES
        self._device[address] = np.full(size, 0xA5, dtype=np.uint8)  # what nobody wrote
        self.live["device memory"] += 1
        return Status.CUDA_SUCCESS, address

    def cuMemFree(self, address: int) -> tuple[Status]:
        if self._device.pop(int(address), None) is None:
            raise Misuse(f"GPU memory at {int(address):#x} is freed twice, or was never allocated")
        self.live["device memory"] -= 1
        return (self._begin("cuMemFree"),)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Status, int]:
        status = self._begin("cuMemHostAlloc") or self._refuse_while_recording()
        if status:
            return Status(status), 0
        block = np.full(size, 0xA5, dtype=np.uint8)
        address = int(block.ctypes.data)
        self._pinned[address] = block
        self.live["pinned memory"] += 1
        return Status.CUDA_SUCCESS, address

    def cuMemFreeHost(self, address: int) -> tuple[Status]:
        if self._pinned.pop(int(address), None) is None:
            raise Misuse("pinned memory is freed twice, or was never allocated")
        self.live["pinned memory"] -= 1
        return (self._begin("cuMemFreeHost"),)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[Status]:
        status = self._begin("cuMemcpyHtoDAsync")
        if status == 0:

            def copy() -> None:
                self.read(int(to), size)[:] = self._host(int(source), size)

            self.stream(stream).enqueue(copy)
        return (status,)

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[Status]:
        status = self._begin("cuMemcpyDtoHAsync")
        if status == 0:

            def copy() -> None:
                self._host(int(to), size)[:] = self.read(int(source), size)

            self.stream(stream).enqueue(copy)
        return (status,)

    def cuStreamCreate(self, flags: int) -> tuple[Status, int]:
        status = self._begin("cuStreamCreate")
        if status:
            return status, 0
        handle = next(self._handles)
        self._streams[handle] = StreamState(handle)
        self.live["streams"] += 1
        return status, handle

    def cuStreamDestroy(self, handle: Any) -> tuple[Status]:
        self.stream(handle)
        del self._streams[int(handle)]
        self.live["streams"] -= 1
        return (self._begin("cuStreamDestroy"),)

    def cuStreamSynchronize(self, handle: Any) -> tuple[Status]:
        status = self._begin("cuStreamSynchronize")
        stream = self.stream(handle)
        if stream.recording is not None:
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        if status == 0:
            stream.finish()
        return (status,)

    def cuStreamBeginCapture(self, handle: Any, mode: CaptureMode) -> tuple[Status]:
        status = self._begin("cuStreamBeginCapture")
        if status == 0:
            self.stream(handle).recording = []
        return (status,)

    def cuStreamEndCapture(self, handle: Any) -> tuple[Status, int]:
        status = self._begin("cuStreamEndCapture")
        stream = self.stream(handle)
        recorded, stream.recording = stream.recording, None
        if status or recorded is None:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 0
        graph = next(self._handles)
        self._graphs[graph] = recorded
        self.live["graphs"] += 1
        return status, graph

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        status = self._begin("cuGraphInstantiate")
        if status:
            return status, 0
        executable = next(self._handles)
        self._graphs[executable] = list(self._graphs[graph])
        self.live["executable graphs"] += 1
        return status, executable

    def cuGraphDestroy(self, graph: int) -> tuple[Status]:
        del self._graphs[graph]
        self.live["graphs"] -= 1
        return (self._begin("cuGraphDestroy"),)

    def cuGraphLaunch(self, executable: int, stream: Any) -> tuple[Status]:
        status = self._begin("cuGraphLaunch")
        if executable not in self._graphs:
            raise Misuse("a graph is launched that was destroyed")
        for work in self._graphs[executable] if status == 0 else ():
            self.stream(stream).enqueue(work)
        return (status,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Status]:
        if self._graphs.pop(executable, None) is None:
            raise Misuse("a graph is destroyed twice")
        self.live["executable graphs"] -= 1
        return (self._begin("cuGraphExecDestroy"),)
