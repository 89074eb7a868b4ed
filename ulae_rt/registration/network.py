"""The network behind one interface: weights that torch runs, or an exported engine."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ulae_rt.arguments import PathLike, check_choice, device_name, parse_device, path_of, what_is_at
from ulae_rt.engines import BACKENDS as ENGINE_BACKENDS
from ulae_rt.engines import Engine, load_engine
from ulae_rt.engines.backends.base import Array, failure
from ulae_rt.engines.backends.captured import CapturedProgram, inference
from ulae_rt.engines.folder import PRECISIONS
from ulae_rt.engines.folder import SUFFIXES as ENGINE_SUFFIXES
from ulae_rt.engines.session import Metadata
from ulae_rt.engines.values import ValuesT
from ulae_rt.errors import UlaeError, UsageError
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
    def device(self) -> str:
        """``cpu`` or ``cuda:N``: where torch tensors must lie that it is given."""

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

    def displacement(self, moving: ValuesT, fixed: ValuesT) -> ValuesT:
        """Register (B, 1, D, H, W) float32 each in [0, 1]: (B, 3, D, H, W) voxels.

        Both images are arrays, and so is the result; or both are torch tensors on `device`, and the
        result is a new tensor there.
        """


class TorchBackend:
    """Weights run by torch, with the methods that the backends of exported engines have.

    On a GPU each number of pairs is recorded once as a CUDA graph and then replayed.

    Args:
        model: in eval mode, on any device; it is not changed.
        device: ``cpu``, ``cuda`` or ``cuda:N``, where it is to run.
        precision: of the features: fp32, fp16 or bf16.
    """

    name = "torch"

    def __init__(self, model: "UlaeNet", device: str, precision: str) -> None:
        import torch

        from ulae_rt.model.blocks import channel_multiple
        from ulae_rt.model.checkpoint import PRECISIONS
        from ulae_rt.model.program import InferenceProgram

        kind, index = parse_device(device)
        self.device = f"cuda:{index}" if kind == "cuda" else "cpu"
        multiple = channel_multiple(PRECISIONS[precision] or torch.float32, kind)
        program = InferenceProgram(model, precision, multiple).to(self.device)
        self._program: InferenceProgram | None = program
        image: tuple[int, ...] = (ANY_BATCH, 1, *model.metadata.shape)
        disp: tuple[int, ...] = (ANY_BATCH, 3, *model.metadata.shape)
        self.inputs = {"moving": image, "fixed": image}
        self.outputs = {"moved": image, "disp": disp}
        self._captured: dict[tuple[int, tuple[str, ...]], CapturedProgram] = {}
        if kind == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Execute once; see `ulae_rt.engines.backends.base.Backend.run`."""
        names = tuple(self.outputs if outputs is None else outputs)
        images = [feeds[name] for name in self.inputs]
        try:
            if self.device == "cpu":
                results = self._on_cpu(images, names)
            else:
                results = self._on_gpu(images, names)
        except RuntimeError as error:  # torch has no narrower one for memory of the CPU
            if isinstance(error, UlaeError):
                raise
            self._captured.clear()  # what a smaller batch may need
            raise failure(f"running the weights on {self.device}", error) from error
        return dict(zip(names, results, strict=True))

    def _on_cpu(self, arrays: Sequence[Array], names: Sequence[str]) -> list[Array]:
        import torch

        with inference():
            # torch warns of arrays that may not be written to.
            writable = [np.require(array, requirements="W") for array in arrays]
            results = self._call(names, *(torch.from_numpy(array) for array in writable))
            return [np.asarray(result.numpy()) for result in results]

    def _on_gpu(self, images: Sequence[Any], names: tuple[str, ...]) -> list[Any]:
        key = len(images[0]), names
        if key not in self._captured:
            # Those of a full part and of what is left at the end; each holds memory.
            while len(self._captured) >= _MOST_CAPTURED:
                self._captured.pop(next(iter(self._captured)))
            program = partial(self._call, names)
            shapes = [tuple(image.shape) for image in images]
            self._captured[key] = CapturedProgram(program, shapes, self._stream, self._pool)
        return self._captured[key](images, range(len(names)))

    def _call(self, names: Sequence[str], *images: "torch.Tensor") -> "list[torch.Tensor]":
        assert self._program is not None  # its engine sees to that
        if "moved" not in names:
            return [self._program.displacement(*images)]
        moved, disp = self._program(*images)
        return [moved if name == "moved" else disp for name in names]

    def close(self) -> None:
        """Free the weights."""
        self._captured.clear()
        self._program = None


_MOST_CAPTURED = 2


def _open_weights(path: Path | None, device: str, precision: str) -> Engine:
    # Here, not above: a command looks at its arguments before torch is loaded.
    torch = require("torch", "torch")
    require("safetensors", "torch")
    from ulae_rt.model import load_model
    from ulae_rt.model.checkpoint import DEFAULT_WEIGHTS

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "fp32" if precision == "auto" else precision  # what the weights are
    model = load_model(path, device=device, precision=precision)
    digest = sha256((DEFAULT_WEIGHTS if path is None else path).read_bytes())
    return Engine(TorchBackend(model, device, precision), model.metadata, precision, digest)


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
