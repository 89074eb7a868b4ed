"""torch: ``.pt2``, an exported program for the CPU or an AOTInductor package for one GPU."""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ulae_rt.allocator import keep_freed_memory
from ulae_rt.engines.backends.base import Array, failure
from ulae_rt.engines.machine import parse_device
from ulae_rt.errors import BackendUnavailable
from ulae_rt.manifest import Manifest
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
                    self._program: Any = torch._inductor.aoti_load_package(
                        str(path), device_index=index
                    )
            else:
                keep_freed_memory()
                self._program = torch.export.load(io.BytesIO(content)).module(check_guards=False)
        except Exception as error:  # zip, JSON, pickle and C++ errors share no class
            raise failure(
                f"loading {manifest.artefact} with torch {torch.__version__}", error
            ) from error

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once; see :meth:`Backend.run`."""
        import torch

        try:
            # Unless told otherwise, torch lets cuDNN round float32 convolutions to TF32.
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
            with torch.inference_mode(), exact:
                images = [torch.from_numpy(feeds[name]).to(self.device) for name in self.inputs]
                found = self._program(*images)
                arrays = [np.asarray(x.cpu()) for x in found]
        except RuntimeError as error:
            raise failure(f"running the program on {self.device}", error) from error
        return dict(zip(self.outputs, arrays, strict=True))

    def close(self) -> None:
        """Free the program."""
        self._program = None
