"""Two scans in, one aligned to the other: the whole of a registration, for Python callers."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.engines import BACKENDS as ENGINE_BACKENDS
from ulae_rt.engines import Engine, EngineOutput, load_engine
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.folder import PRECISIONS
from ulae_rt.engines.folder import SUFFIXES as ENGINE_SUFFIXES
from ulae_rt.engines.session import Metadata
from ulae_rt.errors import CheckpointError, EngineMismatch, UlaeError, UsageError
from ulae_rt.imaging.affine import AFFINE_MODES, AffineMode, register_affine
from ulae_rt.imaging.grid import (
    Affine,
    Grid,
    cut_off,
    grid_of,
    network_input,
    pool,
    resample,
    warn_cut_off,
    with_background,
    working_grid,
)
from ulae_rt.imaging.nifti import (
    Kind,
    Outputs,
    PathLike,
    Volume,
    image_on_grid,
    read_volume,
    save_image,
    volume_from_array,
    volume_from_image,
)
from ulae_rt.imaging.similarity import correlation
from ulae_rt.imaging.transform import (
    Deformation,
    folding,
    jacobian_determinant,
    warp_image,
)
from ulae_rt.imaging.warpfile import Warp, WarpFormat, warp_to_image
from ulae_rt.manifest import ANY_BATCH
from ulae_rt.optional import require

if TYPE_CHECKING:
    from ulae_rt.model import UlaeNet

logger = logging.getLogger(__name__)

Scan = PathLike | Volume | nib.Nifti1Image | tuple[NDArray[Any], NDArray[Any]]

BACKENDS = ("auto", "torch", *ENGINE_BACKENDS[1:])
SIMILARITY = "Pearson correlation inside the fixed brain"


class Network(Protocol):
    """A network behind one interface, whatever runs it; an `Engine` is one."""

    @property
    def metadata(self) -> Metadata:
        """What it was made for."""

    @property
    def description(self) -> str:
        """Backend, device and precision, for people."""

    @property
    def batch(self) -> int:
        """What the number of pairs must be a multiple of."""

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
        # torch lets cuDNN round float32 convolutions to TF32 unless told otherwise; a displacement
        # of 20 voxels would be off by hundredths of one.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        try:
            with torch.inference_mode(), exact:
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

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "fp32" if precision == "auto" else precision  # what the weights are
    model = load_model(path, device=device, precision=precision)
    return Engine(TorchBackend(model, device), model.metadata, precision)


def load_network(
    path: PathLike | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "fp32",
) -> Engine:
    """Open weights (run by torch) or an engine (a folder, ``.onnx``, ``.engine``, ``.pt2``).

    Args:
        path: a weights file, an engine's folder or file, or None for the weights that the package
            ships.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        backend: what runs it; ``auto`` decides by the file, and in a folder for the fastest.
        precision: of the network's features; of an engine's folder, which one. ``auto`` is fp32
            for weights and whichever is the fastest for a folder.

    Raises:
        UsageError: an unknown backend or precision, or a backend that does not fit the file.
        CheckpointError, BackendUnavailable, EngineMismatch: as the file's own loader says.
    """
    for name, value, choices in (
        ("backend", backend, BACKENDS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in choices:
            raise UsageError(f"{name} is {value!r}, expected one of {', '.join(choices)}", "see -h")
    path = None if path is None else Path(path)
    if path is not None and (path.is_dir() or path.suffix in ENGINE_SUFFIXES):
        if backend == "torch":
            raise UsageError(f"{path} is an engine, which torch does not run", "give --weights")
        return load_engine(path, device=device, backend=backend, precision=precision)
    if backend not in ("auto", "torch"):
        raise UsageError(
            f"backend {backend} needs an engine, not weights",
            "make one with 'ulae-rt export' and give its folder: --engine DIR",
        )
    return _open_weights(path, device, precision)


@dataclass
class Stats:
    """What a registration achieved and what it took.

    Attributes:
        similarity_before: `SIMILARITY` of fixed and moving through the affine only, -1 to 1.
        similarity_after: the same of fixed and moved.
        folding_percent: voxels of the fixed brain with a Jacobian determinant of 0 or less.
        folding_image_percent: the same of all voxels of the fixed image.
        seconds: wall-clock time of each stage.
    """

    similarity_before: float
    similarity_after: float
    folding_percent: float
    folding_image_percent: float
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "similarity": SIMILARITY}


@dataclass
class Result:
    """One registered pair; everything lies on the fixed image's own grid.

    Attributes:
        moved: the moving image in the fixed image's space, float32.
        warp: the whole displacement, affine included; `Warp.save` writes it.
        jacobian: (X, Y, Z) float32, determinant of the warp's derivative.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        stats: similarity, folding and seconds.
        moved_labels: the moving label map in the fixed image's space, its type kept.
        before: (X, Y, Z) float32, moving through the affine only.
        deformation: the network's displacement on its own grid, and the affine.
        fixed: the fixed image.
    """

    moved: nib.Nifti1Image
    warp: Warp
    jacobian: NDArray[np.float32]
    affine: Affine
    stats: Stats
    moved_labels: nib.Nifti1Image | None
    before: NDArray[np.float32]
    deformation: Deformation
    fixed: Volume

    def save(
        self,
        moved: PathLike | None = None,
        warp: PathLike | None = None,
        *,
        moved_labels: PathLike | None = None,
        jacobian: PathLike | None = None,
        qc: PathLike | None = None,
        caption: str = "",
        warp_format: WarpFormat = "itk",
        overwrite: bool = False,
        inputs: Sequence[PathLike] = (),
    ) -> list[Path]:
        """Write what has a path: all of it, or on any error and on Ctrl-C none of it.

        Args:
            moved: ``.nii`` or ``.nii.gz``, as the next three.
            warp: in the form that ``warp_format`` names.
            moved_labels: needs labels given to the registrar.
            jacobian: determinant of the warp's derivative.
            qc: ``.png``, the picture of `ulae_rt.imaging.qc`.
            caption: the picture's.
            warp_format: see `ulae_rt.imaging.warpfile.warp_to_image`.
            overwrite: replace files that exist.
            inputs: files that must not be written to.

        Raises:
            UsageError, OutputError: see `ulae_rt.imaging.nifti.check_output`.
        """
        if moved_labels is not None and self.moved_labels is None:
            raise UsageError("there are no moved labels", "give labels to the registrar")
        # The warp takes longest to pack, so it goes first.
        images: list[tuple[PathLike | None, Callable[[], Any]]] = [
            (warp, lambda: warp_to_image(self.warp.disp, self.fixed, warp_format)),
            (moved, lambda: self.moved),
            (jacobian, lambda: image_on_grid(self.jacobian, self.fixed)),
            (moved_labels, lambda: self.moved_labels),
        ]
        wanted = [(Path(path), make) for path, make in images if path is not None]
        pictures = [] if qc is None else [Path(qc)]
        paths = [path for path, _ in wanted] + pictures
        with output_files(paths, overwrite, inputs) as outputs:
            with ThreadPoolExecutor(WRITERS) as pool:
                jobs = [pool.submit(_write, make, outputs.temporary(path)) for path, make in wanted]
                for path in pictures:
                    self._draw(outputs.temporary(path), caption)
                for job in jobs:
                    job.result()
            return outputs.commit()

    def _draw(self, path: Path, caption: str) -> None:
        from ulae_rt.imaging.qc import qc_figure  # matplotlib takes half a second to import

        qc_figure(
            path,
            fixed=self.fixed.data,
            before=self.before,
            after=np.asanyarray(self.moved.dataobj),
            disp=self.deformation.network_part(grid_of(self.fixed)),
            jacobian=self.jacobian,
            affine=self.fixed.affine,
            caption=caption,
        )


# Packing releases the interpreter; more threads than files that matter would only hold memory.
WRITERS = 2


def _write(make: Callable[[], nib.Nifti1Image], path: Path) -> None:
    save_image(make(), path)


def output_files(paths: Sequence[PathLike], overwrite: bool, inputs: Sequence[PathLike]) -> Outputs:
    """Check the outputs of a registration; pictures end in .png, the rest in .nii or .nii.gz."""
    pictures = {Path(path): (".png",) for path in paths if Path(path).suffix.lower() == ".png"}
    return Outputs(paths, overwrite=overwrite, inputs=inputs, suffixes=pictures)


class Registrar:
    """Registers pairs of scans with one network.

    Example:
        >>> registrar = Registrar()
        >>> result = registrar("moving.nii.gz", "fixed.nii.gz")
        >>> result.save("moved.nii.gz", "warp.nii.gz")
    """

    def __init__(
        self,
        weights: PathLike | Network | None = None,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "fp32",
        affine: AffineMode = "affine",
    ) -> None:
        """Open the network.

        Args:
            weights: a weights file, an engine's folder or file, an opened network, or None for
                the weights that the package ships.
            device: ``auto``, ``cpu`` or ``cuda[:N]``.
            backend: what runs the network; ``auto`` decides by the file.
            precision: of the network's features; of an engine's folder, which one. ``auto`` takes
                fp32 weights, and of a folder the fastest engine.
            affine: how the pair is aligned first; see `register_affine`.
        """
        if affine not in AFFINE_MODES:
            raise UsageError(
                f"affine is {affine!r}, expected one of {', '.join(AFFINE_MODES)}", "see -h"
            )
        self.affine: AffineMode = affine
        self.network: Network
        if weights is None or isinstance(weights, str | os.PathLike):
            self.network = load_network(
                weights, device=device, backend=backend, precision=precision
            )
        else:
            self.network = weights

    def __call__(
        self,
        moving: Scan,
        fixed: Scan,
        *,
        labels: Scan | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Result:
        """Register ``moving`` to ``fixed``.

        Args:
            moving: a path, a nibabel image, or (array (X, Y, Z), affine (4, 4) to RAS mm).
            fixed: likewise, of any other size, spacing and orientation.
            labels: a label map in the moving image's space, carried along.
            progress: called with the name of each stage as it starts.

        Raises:
            ImageError, GeometryError: a scan that cannot be used; see `read_volume`.
            EngineMismatch: the network returned NaN or another grid.
        """
        clock = Clock(progress)
        with clock("read"):
            moving_volume = as_volume(moving, "moving")
            fixed_volume = as_volume(fixed, "fixed")
            label_volume = None if labels is None else as_volume(labels, "labels", "labels")
            _warn_same(moving_volume, fixed_volume)
        with clock("affine"):
            moving_brain = with_background(moving_volume)
            fixed_brain = with_background(fixed_volume)
            affine = register_affine(moving_brain, fixed_brain, self.affine)
        with clock("preprocess"):
            grid, moving_input, fixed_input = self._inputs(moving_brain, fixed_brain, affine)
            brain = fixed_brain.data > 0
            del moving_brain, fixed_brain
        with clock("network"):
            disp = self._displacement(moving_input, fixed_input, grid)
            del moving_input, fixed_input
        with clock("warp"):
            target = grid_of(fixed_volume)
            deformation = Deformation(disp, grid, affine)
            total = deformation.sample(target)
            moved = warp_image(moving_volume, total, target)
            moved_labels = None
            if label_volume is not None:
                carried = warp_image(label_volume, total, target, "nearest")
                moved_labels = image_on_grid(carried, fixed_volume)
            jacobian = jacobian_determinant(total, fixed_volume.affine)
            before = resample(moving_volume, target, affine)
            fixed_values = fixed_volume.data[brain]
            folds = folding(jacobian, brain)
            stats = Stats(
                correlation(fixed_values, before[brain]),
                correlation(fixed_values, moved[brain]),
                folds.brain_percent,
                folds.image_percent,
            )
        stats.seconds = clock.seconds
        return Result(
            image_on_grid(moved, fixed_volume),
            Warp(total, fixed_volume),
            jacobian,
            affine,
            stats,
            moved_labels,
            before,
            deformation,
            fixed_volume,
        )

    def _inputs(
        self, moving: Volume, fixed: Volume, affine: Affine
    ) -> tuple[Grid, NDArray[np.float32], NDArray[np.float32]]:
        """The network's grid and its two inputs, made as `prepare` and training make theirs."""
        metadata = self.network.metadata
        factor = round(metadata.spacing_mm)
        if factor < 1 or abs(factor - metadata.spacing_mm) > 1e-6:
            raise CheckpointError(
                f"the network's grid has {metadata.spacing_mm} mm, expected 1, 2 or another "
                "whole number",
                "train or export it again at 1 or 2 mm",
            )
        d, h, w = (n * factor for n in metadata.shape)
        grid, lost = working_grid(fixed, (d, h, w))
        warn_cut_off(lost, fixed.name, grid)
        lost = cut_off(moving, grid, np.asarray(np.linalg.inv(affine)))
        warn_cut_off(lost, moving.name, grid)
        fixed_input = pool(network_input(fixed, grid, None, metadata.normalisation), factor)
        moving_input = pool(network_input(moving, grid, affine, metadata.normalisation), factor)
        return grid.pooled(factor), moving_input, fixed_input

    def _displacement(
        self, moving: NDArray[np.float32], fixed: NDArray[np.float32], grid: Grid
    ) -> NDArray[np.float32]:
        # An engine made for more pairs at once gets the one as often as it wants.
        size = self.network.batch
        images = [np.repeat(x[None, None], size, axis=0) for x in (moving, fixed)]
        disp: NDArray[np.float32] = self.network.run(*images).disp[0]
        if disp.shape != (3, *grid.shape):
            raise EngineMismatch(
                f"the network returned a displacement of {disp.shape}, expected {(3, *grid.shape)}",
                "export the engine again from its weights",
            )
        if not np.isfinite(disp).all():
            raise EngineMismatch(
                f"the network returned NaN or Inf ({self.network.description})",
                "use --precision fp32; if that is what ran, the weights are damaged",
            )
        return disp


class Clock:
    """Seconds by stage."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as ``stage``, added to what the stage took before."""
        if self._progress is not None:
            self._progress(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def as_volume(scan: Scan, name: str, kind: Kind = "image") -> Volume:
    """Read or check one input of a registration; ``name`` is for messages about arrays."""
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | os.PathLike):
        return read_volume(scan, kind=kind)
    if isinstance(scan, tuple):
        if len(scan) != 2:
            raise UsageError(
                f"{name} is a tuple of {len(scan)}, expected (array, affine)",
                "give a path, a nibabel image, or (array, affine)",
            )
        return volume_from_array(*scan, name=name, kind=kind)
    return volume_from_image(scan, name=name, kind=kind)


def _warn_same(moving: Volume, fixed: Volume) -> None:
    same_file = moving.path is not None and fixed.path is not None
    same_file = same_file and os.path.samefile(str(moving.path), str(fixed.path))
    if same_file or (
        moving.shape == fixed.shape
        and np.array_equal(moving.affine, fixed.affine)
        and np.array_equal(moving.data, fixed.data)
    ):
        logger.warning("moving and fixed are the same image: there is nothing to align")
