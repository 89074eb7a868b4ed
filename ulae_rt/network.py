"""The network behind one interface: weights that torch runs, or an exported engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ulae_rt.arguments import check_choice, device_name, parse_device, path_of, what_is_at
from ulae_rt.convolutions import exact_convolutions
from ulae_rt.engines import BACKENDS as ENGINE_BACKENDS
from ulae_rt.engines import Engine, EngineOutput, load_engine
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.folder import PRECISIONS
from ulae_rt.engines.folder import SUFFIXES as ENGINE_SUFFIXES
from ulae_rt.engines.session import Metadata
from ulae_rt.errors import UlaeError, UsageError
from ulae_rt.imaging.nifti import PathLike
from ulae_rt.manifest import ANY_BATCH, sha256
from ulae_rt.optional import require

if TYPE_CHECKING:
    import torch

    from ulae_rt.model import UlaeNet

BACKENDS = ("auto", "torch", *ENGINE_BACKENDS[1:])


@runtime_checkable
class Network(Protocol):
    """A network behind one interface, whatever runs it; an `Engine` is one."""

    @property
    def metadata(self) -> Metadata:
        """What it was made for."""

    @property
    def description(self) -> str:
        """Backend, device and precision, for people."""

    @property
    def precision(self) -> str:
        """fp32, fp16 or bf16."""

    @property
    def weights_sha256(self) -> str:
        """Of the file of weights that it was made from."""

    @property
    def batch(self) -> int:
        """What the number of pairs must be a multiple of."""

    @property
    def at_once(self) -> int:
        """How many pairs it is best given."""

    def run(self, moving: Any, fixed: Any) -> EngineOutput:
        """Register (B, 1, D, H, W) float32 each in [0, 1]."""


class TorchBackend:
    """Weights run by torch, with the methods that the backends of exported engines have.

    Args:
        model: in eval mode, in its precision and on its device.
        device: that device.
    """

    name = "torch"

    def __init__(self, model: "UlaeNet", device: str) -> None:
        self.device = device
        self._model: UlaeNet | None = model
        image: tuple[int, ...] = (ANY_BATCH, 1, *model.metadata.shape)
        disp: tuple[int, ...] = (ANY_BATCH, 3, *model.metadata.shape)
        self.inputs = {"moving": image, "fixed": image}
        self.outputs = {"moved": image, "disp": disp}

    def run(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Execute once; see `ulae_rt.engines.backends.base.Backend.run`."""
        import torch

        assert self._model is not None  # its engine sees to that
        try:
            with torch.inference_mode(), exact_convolutions():
                # torch warns of arrays that may not be written to.
                arrays = [np.require(image, requirements="W") for image in feeds.values()]
                images = [torch.from_numpy(array).to(self.device) for array in arrays]
                out = self._model.predict(*images)
                return {
                    "moved": np.asarray(out.moved.float().cpu().numpy()),
                    "disp": np.asarray(out.disp.float().cpu().numpy()),
                }
        except RuntimeError as error:  # torch has no narrower one for memory of the CPU
            if isinstance(error, UlaeError):
                raise
            raise failure(f"running the weights on {self.device}", error) from error

    def close(self) -> None:
        """Free the weights."""
        self._model = None


def _open_weights(path: Path | None, device: str, precision: str) -> Engine:
    # Here, not above: `register --engine` runs without torch.
    torch = require("torch", "torch")
    require("safetensors", "torch")
    from ulae_rt.model import load_model
    from ulae_rt.model.checkpoint import DEFAULT_WEIGHTS

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "fp32" if precision == "auto" else precision  # what the weights are
    model = load_model(path, device=device, precision=precision)
    digest = sha256((DEFAULT_WEIGHTS if path is None else path).read_bytes())
    return Engine(TorchBackend(model, device), model.metadata, precision, digest)


def load_network(
    path: PathLike | None = None,
    *,
    device: "str | torch.device" = "auto",
    backend: str = "auto",
    precision: str = "fp32",
) -> Engine:
    """Open weights (run by torch) or an engine (a folder, ``.onnx``, ``.engine``, ``.pt2``).

    Args:
        path: a weights file, an engine's folder or file, or None for the weights that the package
            ships.
        device: ``auto``, ``cpu`` or ``cuda[:N]``, or a ``torch.device``.
        backend: what runs it; ``auto`` decides by the file, and in a folder for the fastest.
        precision: of the network's features; of an engine's folder, which one. ``auto`` is fp32
            for weights and whichever is the fastest for a folder.

    Raises:
        UsageError: an unknown backend or precision, or a backend that does not fit the file.
        CheckpointError, BackendUnavailable, EngineMismatch: as the file's own loader says.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, PRECISIONS)
    device = device_name(device)
    parse_device(device)
    path = None if path is None else path_of(path)
    if path is not None and (
        what_is_at(path) == "folder" or path.suffix.lower() in ENGINE_SUFFIXES
    ):
        if backend == "torch":
            raise UsageError(
                f"{path} is an engine, which torch does not run",
                "leave out --backend torch, or give --weights FILE in place of the engine",
            )
        return load_engine(path, device=device, backend=backend, precision=precision)
    if backend not in ("auto", "torch"):
        raise UsageError(
            f"backend {backend} needs an engine, not weights",
            "make one with 'ulae-rt export' and give its folder: --engine DIR",
        )
    return _open_weights(path, device, precision)
