"""Opening an engine: manifest first, then the hash, then the artefact; and running it."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ulae_rt.engines.backends import Array, Backend, open_backend
from ulae_rt.errors import DtypeError, EngineMismatch, ShapeError
from ulae_rt.manifest import Manifest, manifest_path, sha256

_AGAIN = "export the weights again: python -m ulae_rt.export --weights FILE"


class EngineOutput(NamedTuple):
    """What registration gives.

    Attributes:
        moved: the moving image on the fixed one, (B, 1, D, H, W) float32.
        disp: (B, 3, D, H, W) float32, voxels, see :mod:`ulae_rt.conventions`.
    """

    moved: Array
    disp: Array


class Engine(Protocol):
    """Something that registers, whatever the file it came from."""

    @property
    def manifest(self) -> Manifest:
        """What the artefact is."""
        ...

    @property
    def backend(self) -> str:
        """One of ``BACKENDS``."""
        ...

    @property
    def device(self) -> str:
        """The device it runs on."""
        ...

    def run(self, moving: ArrayLike, fixed: ArrayLike) -> EngineOutput:
        """Register (B, 1, D, H, W) ``moving`` to ``fixed``, float32 in [0, 1]."""
        ...


class EngineSession:
    """A verified artefact and the backend that runs it.

    Args:
        manifest: of the artefact.
        backend: the loaded artefact.

    Raises:
        EngineMismatch: if the artefact's inputs or outputs are not those of the manifest.
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        for what, specs, found in (
            ("inputs", manifest.inputs, backend.inputs),
            ("outputs", manifest.outputs, backend.outputs),
        ):
            expected = {spec.name: spec.shape for spec in specs}
            if found != expected:
                raise EngineMismatch(
                    f"{manifest.artefact}: its {what} are {found}, expected {expected} by its "
                    "manifest",
                    _AGAIN,
                )
        self.manifest = manifest
        self._backend = backend

    @property
    def backend(self) -> str:
        """The library that runs it."""
        return self._backend.name

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
        return self._backend.device

    def run(self, moving: ArrayLike, fixed: ArrayLike) -> EngineOutput:
        """Register ``moving`` to ``fixed``, part by part if the batch is larger than the graph's.

        Args:
            moving: (B, 1, D, H, W) float32 in [0, 1], D, H, W those of the manifest; an array, or
                a torch tensor on the CPU.
            fixed: the same.

        Returns:
            New arrays that belong to the caller.

        Raises:
            ShapeError: for any other shape, or batches that differ.
            DtypeError: for any other type.
        """
        images = dict(zip(self._backend.inputs, map(np.asarray, (moving, fixed)), strict=True))
        batch, graph_batch = self._check(images)
        parts: list[dict[str, Array]] = []
        for start in range(0, batch, graph_batch):
            feeds = {
                name: np.ascontiguousarray(image[start : start + graph_batch])
                for name, image in images.items()
            }
            parts.append(self._backend.run(feeds))
        if len(parts) == 1:
            return EngineOutput(parts[0]["moved"], parts[0]["disp"])
        return EngineOutput(
            np.concatenate([part["moved"] for part in parts]),
            np.concatenate([part["disp"] for part in parts]),
        )

    def _check(self, images: dict[str, Array]) -> tuple[int, int]:
        """The batch of the images and that of the graph, which divides it."""
        for name, image in images.items():
            graph_batch, *sizes = self._backend.inputs[name]
            expected = f"(B, {', '.join(map(str, sizes))})"
            if image.ndim != len(sizes) + 1 or list(image.shape[1:]) != sizes or not len(image):
                raise ShapeError(
                    f"{name} has shape {image.shape}, expected {expected} for this engine",
                    "resample to the engine's grid (manifest.metadata), or export with --shape",
                )
            if image.dtype != np.float32:
                raise DtypeError(
                    f"{name} is {image.dtype}, expected float32", f"{name}.astype('float32')"
                )
        batches = {name: len(image) for name, image in images.items()}
        batch = batches["moving"]
        if len(set(batches.values())) != 1 or batch % graph_batch:
            raise ShapeError(
                f"the batches are {batches}, expected the same, a multiple of {graph_batch}",
                "give one fixed image for each moving one",
            )
        return batch, graph_batch


def load_engine(
    path: str | Path, device: str = "auto", backend: str = "auto", precision: str = "fp32"
) -> Engine:
    """Open an engine that the exporter wrote.

    Args:
        path: the folder the exporter wrote, or one artefact in it, its manifest beside it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: ``auto``, ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        precision: which artefact of a folder; a file is what it is.

    Returns:
        The engine, ready to run.

    Raises:
        EngineMismatch: if a file is missing, is not what its manifest says, or cannot be loaded.
        BackendUnavailable: if the backend or the device cannot be had here.
        UsageError: for an unknown device or backend.
    """
    path = Path(path)
    if path.is_dir():
        folder, manifest = path, _choose(path, precision)
    else:
        folder, manifest = path.parent, _read_for(path)
    artefact = folder / manifest.artefact
    try:
        content = artefact.read_bytes()
    except OSError as error:
        raise EngineMismatch(f"{artefact}: cannot be read ({error.strerror})", _AGAIN) from error
    # The bytes that were hashed are the bytes that are opened.
    if (found := sha256(content)) != manifest.artefact_sha256:
        raise EngineMismatch(
            f"{artefact}: SHA-256 {found[:12]}..., expected {manifest.artefact_sha256[:12]}... "
            "by its manifest; it was changed or damaged after it was verified",
            _AGAIN,
        )
    return EngineSession(manifest, open_backend(manifest, content, device, backend))


def _choose(folder: Path, precision: str) -> Manifest:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise EngineMismatch(f"{folder}: holds no manifest, expected an engine folder", _AGAIN)
    manifests = [Manifest.read(path) for path in paths]
    for manifest in manifests:
        if manifest.precision == precision:
            return manifest
    there = ", ".join(sorted({manifest.precision for manifest in manifests}))
    raise EngineMismatch(
        f"{folder}: holds no {precision} engine, only {there}", "ask for one that is there"
    )


def _read_for(artefact: Path) -> Manifest:
    if not artefact.is_file():
        raise EngineMismatch(
            f"{artefact}: no such engine", "give the folder that export wrote, or a file in it"
        )
    manifest = Manifest.read(manifest_path(artefact))
    if manifest.artefact != artefact.name:
        raise EngineMismatch(
            f"{manifest_path(artefact)}: is the manifest of {manifest.artefact}, expected "
            f"{artefact.name}",
            "an artefact keeps the name its export gave it",
        )
    return manifest
