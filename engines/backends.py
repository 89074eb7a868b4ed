"""What can execute an artefact: one class a library, all with the same few methods."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import BackendUnavailable, EngineMismatch, UsageError

Array = NDArray[np.float32]

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
# The backend that opens each kind of artefact.
_OPENS = {"onnx": "onnxruntime"}


class Backend(Protocol):
    """A loaded artefact.

    Attributes:
        name: one of :data:`BACKENDS`.
        device: ``cpu`` or ``cuda:N``.
        inputs, outputs: name to shape, in the artefact's order.
    """

    name: str
    device: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once: name to array of the artefact's own shape, to the same for the outputs."""
        ...


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU or on one CUDA device.

    Args:
        content: the bytes of an ONNX model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        BackendUnavailable: if ONNX Runtime is not installed or cannot use the device.
        EngineMismatch: if ONNX Runtime cannot load the model.
    """

    name = "onnxruntime"

    def __init__(self, content: bytes, device: str = "auto") -> None:
        runtime = _onnxruntime()
        cuda = "CUDAExecutionProvider"
        kind, index = _parse_device(device)
        if kind == "auto":
            kind = "cuda" if cuda in runtime.get_available_providers() else "cpu"
        elif kind == "cuda" and cuda not in runtime.get_available_providers():
            raise BackendUnavailable(
                f"device {device} was asked for, and this onnxruntime runs on the CPU only",
                "replace it: pip uninstall onnxruntime, then pip install onnxruntime-gpu",
            )
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors; what matters is raised or checked below
        # The arena keeps what it once had and grows in powers of two: 3.3 GB at 160x192x160,
        # against 1.4 GB without it and no time lost (onnxruntime 1.32, CPU).
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
        if kind == "cuda":
            providers.insert(0, (cuda, {"device_id": index}))
        try:
            self._session = runtime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # its exceptions share no base class of their own
            raise EngineMismatch(
                f"ONNX Runtime {runtime.__version__} cannot load the model: {error}",
                "export the weights again with this version installed",
            ) from error
        # Without a usable GPU the session falls back to the CPU and only logs it.
        on_gpu = cuda in self._session.get_providers()
        if _parse_device(device)[0] == "cuda" and not on_gpu:
            raise BackendUnavailable(
                f"device {device} was asked for, and ONNX Runtime cannot use it here",
                "use --device cpu, or run `ulae-rt doctor` to see why",
            )
        self.device = f"cuda:{index}" if on_gpu else "cpu"
        self.inputs = {x.name: tuple(x.shape) for x in self._session.get_inputs()}
        self.outputs = {x.name: tuple(x.shape) for x in self._session.get_outputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once; see :meth:`Backend.run`."""
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))


def open_backend(kind: str, content: bytes, device: str, backend: str) -> Backend:
    """Load an artefact.

    Args:
        kind: the manifest's.
        content: the artefact's bytes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: one of :data:`BACKENDS`.

    Raises:
        UsageError: for an unknown device or backend.
        BackendUnavailable: if the backend or the device cannot be had.
        EngineMismatch: if no backend, or not the one asked for, opens this kind.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend in ("tensorrt", "tensorrt-rtx"):
        raise BackendUnavailable(
            f"backend {backend} was asked for, and this version runs engines with onnxruntime only",
            "use --backend auto or onnxruntime",
        )
    if kind not in _OPENS:
        raise EngineMismatch(
            f"the artefact is of kind {kind!r}, expected one of {', '.join(_OPENS)}",
            "a newer version of ulae_rt wrote it; install that version",
        )
    return OnnxRuntimeBackend(content, device)


def _onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime cannot be imported: {error}",
            "pip install onnxruntime (or onnxruntime-gpu in its place)",
        ) from error


def _parse_device(device: str) -> tuple[str, int]:
    kind, separator, index = device.partition(":")
    known = kind in ("auto", "cpu") and not separator
    if known or (kind == "cuda" and (index.isdecimal() or not separator)):
        return kind, int(index or 0)
    raise UsageError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
