"""torch: ``.pt2``, an exported program for the CPU or an AOTInductor package for one GPU."""

from collections.abc import Mapping

from ulae_rt.engines.backends.base import Array
from ulae_rt.errors import BackendUnavailable
from ulae_rt.manifest import Manifest


class Pt2Backend:
    """torch on the CPU or on one CUDA device.

    Args:
        content: the bytes of a ``.pt2`` file.
        manifest: of the artefact.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        BackendUnavailable: if torch is not installed or cannot use the device.
        EngineMismatch: if torch cannot load the file.
    """

    name = "pt2"
    device: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]

    def __init__(self, content: bytes, manifest: Manifest, device: str = "auto") -> None:
        raise BackendUnavailable(
            f"{manifest.artefact}: backend pt2 is not in this version", "use an ONNX engine"
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once; see :meth:`Backend.run`."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the program."""
