"""What to export, checked before any work starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ulae_rt.conventions import SIZE_MULTIPLE
from ulae_rt.errors import UsageError
from ulae_rt.manifest import ANY_BATCH, KINDS

DEFAULT_FOLDER = Path("build/engines")
PRECISIONS = ("fp32", "fp16", "bf16")
COMPATIBILITIES = ("none", "ampere-plus", "same-capability")
LARGEST_BATCH = 64

# The widest tensor of the full resolution has 18 channels, and runtimes count its elements in 32
# bits (ONNX Runtime's CUDA GridSample among them).
MAX_VOXELS = 2**31 // 32

_SEE = "see ulae-rt export -h"


class Tolerance(NamedTuple):
    """The largest differences from the reference that pass.

    Attributes:
        disp_mean, disp_p99, disp_max: length of the displacement's difference, voxels.
        moved_mean, moved_max: difference of the moved images, intensities in [0, 1].
        sign_flips: voxels whose Jacobian determinant changes its sign, of a million.
    """

    disp_mean: float
    disp_p99: float
    disp_max: float
    moved_mean: float
    moved_max: float
    sign_flips: float


# fp32: 1e-3 voxel is what users are promised; torch's own float32 is 8.6e-4 off at 160x192x160,
# ONNX Runtime's 2.2e-4. fp16 and bf16: several times what was measured with the shipped weights on
# the sample pair and the canary (bench/NOTES.md). Noise changes by up to 1 a voxel, so that its
# moved image is off by as much as its displacement. A wrong sampler is off by 0.2 in the mean.
TOLERANCES = {
    "fp32": Tolerance(2e-4, 1e-3, 1e-3, 1e-4, 1e-3, 100.0),
    "fp16": Tolerance(5e-3, 0.02, 0.1, 2e-3, 0.05, 1000.0),
    "bf16": Tolerance(0.05, 0.15, 0.5, 0.05, 0.5, 5000.0),
}


class Missing(NamedTuple):
    """Why an artefact cannot be made on this machine, and what to do."""

    message: str
    hint: str


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Attributes:
        weights: the file to read; None: the weights the package ships.
        out: the folder to write into; None: ``build/engines/<weights stem>``.
        shape: (D, H, W) of the engines' grid; None: the one the weights were trained on.
        formats: of ``KINDS``; None: what pays on this machine, see ``plan.items``.
        precisions: of :data:`PRECISIONS`; None: each format's own.
        targets: GPU architectures (``sm89``), or ``cpu`` for ``.pt2``; None: this machine.
        batches: pairs a run takes, an artefact each; ``ANY_BATCH`` only in ONNX.
        compatibility: of :data:`COMPATIBILITIES`: on which other GPUs an engine runs too.
        tolerances: fields of ``Tolerance`` to replace, in every precision.
        timing_cache: folder with TensorRT's measured times of kernels, by which builds are faster.
        triton_repository: where to write a model repository for NVIDIA Triton Inference Server.
        overwrite: replace what is already there.

    Raises:
        UsageError: for a value that cannot be exported whatever the weights and the machine.
    """

    weights: Path | None = None
    out: Path | None = None
    shape: tuple[int, int, int] | None = None
    formats: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1,)
    compatibility: str = "none"
    tolerances: Mapping[str, float] = field(default_factory=dict)
    timing_cache: Path | None = None
    triton_repository: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for what, values, known in (
            ("format", self.formats or (), KINDS),
            ("precision", self.precisions or (), PRECISIONS),
            ("compatibility", (self.compatibility,), COMPATIBILITIES),
            ("tolerance", tuple(self.tolerances), Tolerance._fields),
        ):
            for value in values:
                if value not in known:
                    raise UsageError(
                        f"{what} is {value!r}, expected one of {', '.join(known)}", _SEE
                    )
        for batch in self.batches:
            if batch != ANY_BATCH and not 1 <= batch <= LARGEST_BATCH:
                raise UsageError(
                    f"batch is {batch}, expected 1 to {LARGEST_BATCH}",
                    "one pair at 160x192x160 takes over 1 GB while it runs",
                )
        for name, allowed in self.tolerances.items():
            if not allowed >= 0:
                raise UsageError(f"tolerance {name} is {allowed}, expected 0 or more", _SEE)
        if self.shape is not None:
            check_shape(self.shape)

    @property
    def folder(self) -> Path:
        """Where the artefacts go."""
        stem = "ulae-oasis-labels" if self.weights is None else self.weights.stem
        return self.out if self.out is not None else DEFAULT_FOLDER / stem

    def tolerance(self, precision: str) -> Tolerance:
        """What an artefact of a precision may be off by."""
        return TOLERANCES[precision]._replace(**self.tolerances)


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse a grid that the network or a runtime cannot work on."""
    if len(shape) != 3 or any(size < 1 or size % SIZE_MULTIPLE for size in shape):
        raise UsageError(
            f"shape is {' x '.join(map(str, shape))}, expected three positive multiples of "
            f"{SIZE_MULTIPLE}",
            "an engine has one size; pad the images to the next multiple",
        )
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > MAX_VOXELS:
        raise UsageError(
            f"shape is {' x '.join(map(str, shape))}, {voxels} voxels, expected at most "
            f"{MAX_VOXELS}",
            "work on a coarser or smaller grid",
        )
