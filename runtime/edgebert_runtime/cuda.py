"""The little of CUDA that a TensorRT session needs: memory, a stream, and graphs.

It goes through the driver's API, which is the same from CUDA 12 on and asks for no toolkit, in
the context that TensorRT itself uses (the device's primary one). ``cuda-bindings`` is imported
when a ``Cuda`` is made; tests give a driver of their own, ``edgebert_runtime.testing.FakeDriver``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebert_runtime.errors import DeviceError, MissingExtraError

__all__ = ["Cuda", "Stream", "import_driver"]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream
_DEVICE = 0  # CUDA_VISIBLE_DEVICES says which one that is


def import_driver() -> Any:
    """Imports ``cuda.bindings.driver``.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as exc:
        raise MissingExtraError(
            "cuda-bindings is not installed: pip install 'edgebert-runtime[tensorrt]'"
        ) from exc
    return driver


class Cuda:
    """A GPU through its driver. What it allocates is freed by ``close``, in reverse.

    Args:
        driver: ``cuda.bindings.driver``, or what behaves like it.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        DeviceError: There is no driver, or no GPU.
    """

    def __init__(self, driver: Any = None) -> None:
        self._driver = import_driver() if driver is None else driver
        self._held = ExitStack()
        try:
            self._call("cuInit", 0)
        except DeviceError:
            raise
        except Exception as exc:  # cuda-bindings has a class of its own for each way to fail
            raise DeviceError("there is no NVIDIA driver here: libcuda cannot be loaded") from exc
        if self._call("cuDeviceGetCount") == 0:
            raise DeviceError("the NVIDIA driver finds no GPU")
        self._device = self._call("cuDeviceGet", _DEVICE)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._closed = False

    def _call(self, name: str, *args: Any) -> Any:
        """Calls a driver function; returns its result, without the status.

        Raises:
            DeviceError: It failed.
        """
        status, *results = getattr(self._driver, name)(*args)
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            said = text.decode() if isinstance(text, bytes) else str(status)
            raise DeviceError(f"{name} failed: {said} (CUDA error {int(status)})")
        return results[0] if len(results) == 1 else tuple(results)

    @property
    def name(self) -> str:
        """The GPU's name."""
        raw: bytes = self._call("cuDeviceGetName", 256, self._device)
        return raw.split(b"\0")[0].decode(errors="replace")

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor."""
        names = self._driver.CUdevice_attribute
        return (
            self._attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )

    @property
    def is_integrated(self) -> bool:
        """Whether the GPU shares the processor's memory, as on a Jetson."""
        names = self._driver.CUdevice_attribute
        return bool(self._attribute(names.CU_DEVICE_ATTRIBUTE_INTEGRATED))

    @property
    def driver_cuda(self) -> tuple[int, int]:
        """The newest CUDA that the driver supports: major and minor."""
        version = int(self._call("cuDriverGetVersion"))
        return version // 1000, version % 1000 // 10

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """Free and all memory of the GPU."""
        with self.current():
            free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def _attribute(self, attribute: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", attribute, self._device))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the GPU the calling thread's own for a while; what was there comes back."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def device_memory(self, size: int) -> int:
        """Allocates GPU memory, which ``close`` frees; returns its address."""
        pointer = self._call("cuMemAlloc", max(size, 1))
        self._held.callback(self._call, "cuMemFree", pointer)
        return int(pointer)

    def pinned_memory(self, size: int) -> NDArray[np.uint8]:
        """Allocates memory that the GPU reads and writes by itself, ``uint8[size]``."""
        import ctypes

        address = int(self._call("cuMemHostAlloc", max(size, 1), 0))
        self._held.callback(self._call, "cuMemFreeHost", address)
        block = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(memoryview(block), dtype=np.uint8)

    def stream(self) -> Stream:
        """Makes a stream, which ``close`` destroys."""
        handle = self._call("cuStreamCreate", _NON_BLOCKING)
        self._held.callback(self._call, "cuStreamDestroy", handle)
        return Stream(self._call, handle, self._driver)

    def close(self) -> None:
        """Frees everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as last:  # in reverse; if the GPU is lost, its context goes all the same
            last.callback(self._call, "cuDevicePrimaryCtxRelease", self._device)
            last.enter_context(self.current())
            last.callback(self._held.close)

    def __enter__(self) -> Cuda:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Stream:
    """Work that the GPU does in order. Its context must be current; see ``Cuda.current``."""

    def __init__(self, call: Callable[..., Any], handle: Any, driver: Any) -> None:
        self._call = call
        self._handle = handle
        self._driver = driver

    def __int__(self) -> int:
        return int(self._handle)

    def to_device(self, address: int, source: NDArray[Any]) -> None:
        """Enqueues a copy of pinned memory to the GPU."""
        self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, source.nbytes, self._handle)

    def to_host(self, target: NDArray[Any], address: int) -> None:
        """Enqueues a copy from the GPU to pinned memory."""
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, address, target.nbytes, self._handle)

    def wait(self) -> None:
        """Waits for all that was enqueued."""
        self._call("cuStreamSynchronize", self._handle)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Records what ``enqueue`` enqueues, without doing it; returns a graph for ``launch``.

        Raises:
            DeviceError: The work cannot be recorded. The stream can be used as before.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._handle, mode)
        try:
            enqueue()
        except BaseException:
            self._end_capture()
            raise
        recorded = self._call("cuStreamEndCapture", self._handle)
        try:
            return self._call("cuGraphInstantiate", recorded, 0)
        finally:
            self._call("cuGraphDestroy", recorded)

    def _end_capture(self) -> None:
        """Ends a capture that went wrong, and what was recorded with it."""
        status, recorded = self._driver.cuStreamEndCapture(self._handle)
        if int(status) == 0:
            self._call("cuGraphDestroy", recorded)

    def launch(self, graph: Any) -> None:
        """Enqueues a graph."""
        self._call("cuGraphLaunch", graph, self._handle)

    def destroy(self, graph: Any) -> None:
        """Frees a graph."""
        self._call("cuGraphExecDestroy", graph)
