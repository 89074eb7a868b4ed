"""torch: ``.pt2``, an exported program for the CPU or an AOTInductor package for one GPU."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulae_rt.allocator import keep_freed_memory
from ulae_rt.arguments import parse_device
from ulae_rt.convolutions import exact_convolutions
from ulae_rt.engines.backends.base import Array, failure
from ulae_rt.errors import BackendUnavailable
from ulae_rt.manifest import ANY_BATCH, Manifest
from ulae_rt.optional import require

_log = logging.getLogger(__name__)


class Pt2Backend:
    """torch on the CPU or on one CUDA device.

    Loading runs what the file says, which torch may have to unpickle: the caller has checked the
    file against the hash in its manifest.

    Args:
        content: the bytes of a ``.pt2`` file.
        manifest: of the artefact.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        BackendUnavailable: if torch is not installed or cannot use the device.
        EngineMismatch: if torch cannot load the file.
    """

    name = "pt2"

    def __init__(self, content: bytes, manifest: Manifest, device: str = "cpu") -> None:
        require("torch", "torch")
        import torch

        kind, index = parse_device(device)
        if kind == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                f"device cuda:{index} was asked for, and this torch sees no GPU",
                "`ulae-rt doctor` says why; an ONNX engine runs on the CPU",
            )
        self.device = f"cuda:{index}" if kind == "cuda" else "cpu"
        self.inputs = {spec.name: spec.shape for spec in manifest.inputs}
        self.outputs = {spec.name: spec.shape for spec in manifest.outputs}
        try:
            if kind == "cuda":
                # AOTInductor loads from a path only, and keeps what it unpacked.
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / manifest.artefact
                    path.write_bytes(content)
                    # Its other way to run asks for events, which no CUDA graph may record.
                    program: Any = torch._inductor.aoti_load_package(
                        str(path), run_single_threaded=True, device_index=index
                    )
                if ANY_BATCH in (shape[0] for shape in self.inputs.values()):
                    self._program: _OnHost | _Captured | None = _OnHost(program, self.device)
                else:
                    self._program = _Captured(program, self.inputs, self.device)
            else:
                keep_freed_memory()
                program = torch.export.load(io.BytesIO(content)).module(check_guards=False)
                self._program = _OnHost(program, self.device)
        except Exception as error:  # zip, JSON, pickle and C++ errors share no class
            raise failure(
                f"loading {manifest.artefact} with torch {torch.__version__}", error
            ) from error

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once; see :meth:`Backend.run`."""
        assert self._program is not None  # its engine sees to that
        try:
            arrays = self._program([feeds[name] for name in self.inputs])
        except RuntimeError as error:
            raise failure(f"running the program on {self.device}", error) from error
        return dict(zip(self.outputs, arrays, strict=True))

    def close(self) -> None:
        """Free the program."""
        self._program = None


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    import torch

    with torch.inference_mode(), exact_convolutions():
        yield


class _OnHost:
    """A program called with what comes, of any batch."""

    def __init__(self, program: Callable[..., Any], device: str) -> None:
        self._program = program
        self._device = device

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        import torch

        with _exact():
            # torch warns of arrays that may not be written to.
            writable = [np.require(array, requirements="W") for array in arrays]
            images = [torch.from_numpy(array).to(self._device) for array in writable]
            return [np.asarray(x.cpu()) for x in self._program(*images)]


class _Captured:
    """A program of fixed sizes on a GPU: its own stream, its memory set aside, one CUDA graph.

    Args:
        program: what AOTInductor loaded.
        inputs: name to shape.
        device: ``cuda:N``.
    """

    def __init__(
        self, program: Callable[..., Any], inputs: Mapping[str, tuple[int, ...]], device: str
    ) -> None:
        import torch

        self._program = program
        self._stream = torch.cuda.Stream(device)
        self._graph: Any = None
        self._inputs = [torch.zeros(shape, device=device) for shape in inputs.values()]
        # Only pinned memory is copied while the host goes on.
        self._sent = [torch.empty(shape, pin_memory=True) for shape in inputs.values()]
        with torch.cuda.device(device), _exact():
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                self._outputs = list(program(*self._inputs))  # loads kernels, which a graph cannot
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    outputs = list(program(*self._inputs))
            except RuntimeError as error:
                _log.warning("the .pt2 program runs without a CUDA graph: %s", error)
            else:
                self._graph, self._outputs = graph, outputs
        self._received = [torch.empty(x.shape, pin_memory=True) for x in self._outputs]

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        import torch

        with _exact(), torch.cuda.stream(self._stream):
            for place, sent, array in zip(self._inputs, self._sent, arrays, strict=True):
                sent.copy_(torch.from_numpy(np.require(array, requirements="W")))
                place.copy_(sent, non_blocking=True)
            if self._graph is None:
                self._outputs = list(self._program(*self._inputs))
            else:
                self._graph.replay()
            for received, found in zip(self._received, self._outputs, strict=True):
                received.copy_(found, non_blocking=True)
        self._stream.synchronize()
        return [received.numpy().copy() for received in self._received]
