"""torch: ``.pt2``, an exported program for the CPU or an AOTInductor package for one GPU."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulae_rt.allocator import keep_freed_memory
from ulae_rt.arguments import parse_device
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.backends.captured import CapturedProgram, inference
from ulae_rt.errors import BackendUnavailable
from ulae_rt.manifest import ANY_BATCH, Manifest
from ulae_rt.optional import require


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
                    self._program: _Uncaptured | CapturedProgram | None = _Uncaptured(
                        program, self.device
                    )
                else:
                    stream = torch.cuda.Stream(self.device)
                    self._program = CapturedProgram(program, [*self.inputs.values()], stream)
            else:
                keep_freed_memory()
                program = torch.export.load(io.BytesIO(content)).module(check_guards=False)
                self._program = _Uncaptured(program, self.device)
        except Exception as error:  # zip, JSON, pickle and C++ errors share no class
            raise failure(
                f"loading {manifest.artefact} with torch {torch.__version__}", error
            ) from error

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Execute once; see :meth:`Backend.run`."""
        assert self._program is not None  # its engine sees to that
        names = list(self.outputs) if outputs is None else outputs
        places = [list(self.outputs).index(name) for name in names]
        try:
            results = self._program([feeds[name] for name in self.inputs], places)
        except RuntimeError as error:
            raise failure(f"running the program on {self.device}", error) from error
        return dict(zip(names, results, strict=True))

    def close(self) -> None:
        """Free the program."""
        self._program = None


def _without_other_outputs(module: Any, kept: Sequence[int]) -> Any:
    """A program for the CPU that computes only the outputs of the places ``kept``."""
    import torch

    graph = torch.fx.Graph()
    outputs: Any = graph.graph_copy(module.graph, {})
    graph.output(tuple(outputs[number] for number in kept))
    graph.eliminate_dead_code()
    return torch.fx.GraphModule(module, graph)


class _Uncaptured:
    """A program called with what comes, of any batch."""

    def __init__(self, program: Callable[..., Any], device: str) -> None:
        self._program = program
        self._device = device
        self._reduced: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, images: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
        """As of a `CapturedProgram`."""
        import torch

        on_host = isinstance(images[0], np.ndarray)
        with inference():
            if on_host:
                # torch warns of arrays that may not be written to.
                writable = [np.require(array, requirements="W") for array in images]
                images = [torch.from_numpy(array).to(self._device) for array in writable]
            if self._device != "cpu":  # compiled: it computes all of them
                outputs = self._program(*images)
                outputs = [outputs[number] for number in wanted]
            else:
                key = tuple(wanted)
                if key not in self._reduced:
                    self._reduced[key] = _without_other_outputs(self._program, key)
                outputs = self._reduced[key](*images)
        if on_host:
            return [np.asarray(output.cpu()) for output in outputs]
        # Made here and not above, a tensor may be used where gradients are computed.
        return [output.clone() for output in outputs]
