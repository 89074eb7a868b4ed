"""The few calls of CUDA's runtime that an engine needs, each checked, all freed.

Through NVIDIA's own bindings, so that an engine runs where there is no torch.
"""

import ctypes
import math
from contextlib import ExitStack
from typing import Any

import numpy as np

from ulae_rt.engines.backends.base import Array, failure
from ulae_rt.errors import BackendUnavailable
from ulae_rt.optional import require

_FLOAT = 4  # bytes


class Buffer:
    """One input or output: its place on the GPU, and pinned memory of the host to copy through."""

    def __init__(self, cuda: "Cuda", shape: tuple[int, ...]) -> None:
        self.size = _FLOAT * math.prod(shape)
        self.device = int(cuda("cudaMalloc", self.size))
        cuda.on_close("cudaFree", self.device)
        # Only pinned memory is copied while the host goes on.
        self.host = int(cuda("cudaMallocHost", self.size))
        cuda.on_close("cudaFreeHost", self.host)
        memory = (ctypes.c_float * math.prod(shape)).from_address(self.host)
        self.array: Array = np.ctypeslib.as_array(memory).reshape(shape)


class Cuda:
    """One GPU's runtime, and all that was taken from it.

    Args:
        index: of the GPU.
        extra: the extra that installs the bindings.

    Raises:
        BackendUnavailable: if there are no bindings, no driver or no such GPU.
    """

    def __init__(self, index: int, extra: str) -> None:
        self._runtime = require("cuda.bindings.runtime", extra)
        self.index = index
        self._taken = ExitStack()
        try:
            count = self("cudaGetDeviceCount")
        except RuntimeError as error:
            raise BackendUnavailable(
                f"backend {extra} needs an NVIDIA GPU and its driver: {error}",
                "use an engine for the CPU; `ulae-rt doctor` says what can run",
            ) from error
        if index >= count:
            raise BackendUnavailable(
                f"device cuda:{index} was asked for, and there are {count} GPUs",
                "`ulae-rt doctor` lists them",
            )
        self.use()

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime; what it gives besides its error code.

        Raises:
            EngineMismatch: for any error code, which its name comes with.
        """
        error, *results = getattr(self._runtime, function)(*arguments)
        if int(error):
            _, name = self._runtime.cudaGetErrorName(error)
            _, words = self._runtime.cudaGetErrorString(error)
            raise failure(f"in {function}", f"{name.decode()}: {words.decode()}")
        return results[0] if results else None

    def use(self) -> None:
        """Make this GPU the one of the calling thread."""
        self("cudaSetDevice", self.index)

    def on_close(self, function: str, *arguments: Any) -> None:
        """Call a function when closed, before those named earlier."""
        self._taken.callback(getattr(self._runtime, function), *arguments)

    def stream(self) -> Any:
        """A stream of its own, which no other waits for."""
        stream = self("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self.on_close("cudaStreamDestroy", stream)
        return stream

    def upload(self, buffer: Buffer, stream: Any) -> None:
        """Copy to the GPU, behind what the stream has to do."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self("cudaMemcpyAsync", buffer.device, buffer.host, buffer.size, kind, stream)

    def download(self, buffer: Buffer, stream: Any) -> None:
        """Copy to the host, behind what the stream has to do."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self("cudaMemcpyAsync", buffer.host, buffer.device, buffer.size, kind, stream)

    def copy(self, to: int, source: int, size: int, stream: Any) -> None:
        """Copy bytes from one place on the GPU to another, behind what the stream has to do."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self("cudaMemcpyAsync", to, source, size, kind, stream)

    def wait(self, stream: Any) -> None:
        """Until the stream has nothing left to do."""
        self("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: Any) -> None:
        """Record what is given to the stream from now on, and run nothing of it."""
        # Of this thread only: another one may go on allocating.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """What was recorded, ready to be launched."""
        graph = self("cudaStreamEndCapture", stream)
        try:
            launchable = self("cudaGraphInstantiate", graph, 0)
        finally:
            self("cudaGraphDestroy", graph)
        self.on_close("cudaGraphExecDestroy", launchable)
        return launchable

    def close(self) -> None:
        """Free all that was taken, the last first."""
        self._taken.close()
