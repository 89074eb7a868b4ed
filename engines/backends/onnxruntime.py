"""ONNX Runtime: ``.onnx`` on the CPU, or on one CUDA device."""

import importlib
from collections.abc import Mapping
from types import ModuleType

from ulae_rt.engines.backends.base import Array, failure, parse_device
from ulae_rt.errors import BackendUnavailable, EngineMismatch
from ulae_rt.manifest import ANY_BATCH


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
        kind, index = parse_device(device)
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
        if parse_device(device)[0] == "cuda" and not on_gpu:
            raise BackendUnavailable(
                f"device {device} was asked for, and ONNX Runtime cannot use it here",
                "use --device cpu, or run `ulae-rt doctor` to see why",
            )
        self.device = f"cuda:{index}" if on_gpu else "cpu"
        self.inputs = {x.name: _shape(x.shape) for x in self._session.get_inputs()}
        self.outputs = {x.name: _shape(x.shape) for x in self._session.get_outputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once; see :meth:`Backend.run`."""
        try:
            results = self._session.run(None, dict(feeds))
        except Exception as error:  # as above
            raise failure(f"running the model on {self.device}", error) from error
        return dict(zip(self.outputs, results, strict=True))

    def close(self) -> None:
        """Free the model."""
        self._session = None


def _shape(sizes: list[int | str | None]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else ANY_BATCH for size in sizes)


def _onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime cannot be imported: {error}",
            "pip install onnxruntime (or onnxruntime-gpu in its place)",
        ) from error
