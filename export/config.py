"""What to export, checked before any work starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ulae_rt.arguments import check_choice
from ulae_rt.conventions import SIZE_MULTIPLE
from ulae_rt.errors import UsageError
from ulae_rt.manifest import (
    ANY_BATCH,
    COMPATIBILITIES,
    KINDS,
    PRECISIONS,
    TOLERANCE_NAMES,
    TOLERANCES,
    Tolerance,
)

__all__ = ["COMPATIBILITIES", "PRECISIONS", "TOLERANCES", "ExportConfig", "Missing", "Tolerance"]

DEFAULT_FOLDER = Path("build/engines")
LARGEST_BATCH = 64

# The widest tensor of the full resolution has 18 channels, and runtimes count its elements in 32
# bits (ONNX Runtime's CUDA GridSample among them).
MAX_VOXELS = 2**31 // 32


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
        tolerances: fields of ``Tolerance`` to replace, in every precision. Where ``sign_flips`` is
            and ``sign_flip_count`` is not, no number of them passes by its count.
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
            ("tolerance", tuple(self.tolerances), TOLERANCE_NAMES),
        ):
            for value in values:
                check_choice(what, value, known)
        for batch in self.batches:
            if batch != ANY_BATCH and not 1 <= batch <= LARGEST_BATCH:
                raise UsageError(
                    f"batch is {batch}, expected 1 to {LARGEST_BATCH}",
                    "one pair at 160x192x160 takes over 1 GB while it runs",
                )
        for name, allowed in self.tolerances.items():
            if not (allowed >= 0 and math.isfinite(allowed)):
                raise UsageError(
                    f"tolerance {name} is {allowed}, expected 0 or more",
                    "leave it out to have the standard one",
                )
        if self.shape is not None:
            check_shape(self.shape)

    @property
    def folder(self) -> Path:
        """Where the artefacts go."""
        stem = "ulae-oasis-labels" if self.weights is None else self.weights.stem
        return self.out if self.out is not None else DEFAULT_FOLDER / stem

    def tolerance(self, precision: str) -> Tolerance:
        """What an artefact of a precision may be off by."""
        changes = {name: float(allowed) for name, allowed in self.tolerances.items()}
        if "sign_flips" in changes:
            changes.setdefault("sign_flip_count", 0.0)
        return replace(TOLERANCES[precision], **changes)


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
