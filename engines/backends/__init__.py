"""What can execute an artefact: one class a library, all with the same few methods."""

from ulae_rt.arguments import check_choice, parse_device
from ulae_rt.engines.backends.base import Array, Backend
from ulae_rt.engines.backends.onnxruntime import OnnxRuntimeBackend
from ulae_rt.engines.backends.pt2 import Pt2Backend
from ulae_rt.engines.backends.tensorrt import TensorRtBackend
from ulae_rt.engines.machine import check, devices_for
from ulae_rt.errors import EngineMismatch
from ulae_rt.manifest import Manifest

__all__ = ["BACKENDS", "Array", "Backend", "OnnxRuntimeBackend", "backend_of", "open_backend"]

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "pt2")


def backend_of(manifest: Manifest) -> str:
    """The one backend that opens an artefact."""
    return "onnxruntime" if manifest.kind == "onnx" else manifest.kind


def open_backend(
    manifest: Manifest, content: bytes, device: str = "auto", backend: str = "auto"
) -> Backend:
    """Load an artefact, if its manifest says that it was made for this machine.

    Args:
        manifest: what the artefact is.
        content: its bytes; that they are the manifest's is checked by who read them.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: one of :data:`BACKENDS`.

    Raises:
        UsageError: for an unknown device or backend.
        BackendUnavailable: if the backend or the device cannot be had here, or the artefact is for
            another GPU.
        EngineMismatch: if the backend asked for opens other files, another version of the library
            made this one, or it cannot be loaded.
    """
    check_choice("backend", backend, BACKENDS)
    if parse_device(device)[0] == "auto":
        device = devices_for(manifest)[0]
    needed = backend_of(manifest)
    if backend not in ("auto", needed):
        raise EngineMismatch(
            f"{manifest.artefact}: backend {backend} was asked for, and {needed} opens it",
            f"use --backend auto or {needed}",
        )
    check(manifest, device)
    if needed == "onnxruntime":
        return OnnxRuntimeBackend(content, device, manifest.batch)
    if needed == "pt2":
        return Pt2Backend(content, manifest, device)
    return TensorRtBackend(content, manifest.kind, device)
