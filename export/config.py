"""What to export, checked before any work starts."""

from dataclasses import dataclass
from pathlib import Path

from ulae_rt.conventions import SIZE_MULTIPLE
from ulae_rt.errors import UsageError

FORMATS = ("onnx",)
PRECISIONS = ("fp32",)
DEFAULT_FOLDER = Path("build/engines")

# The widest tensor of the full resolution has 18 channels, and runtimes count its elements in 32
# bits (ONNX Runtime's CUDA GridSample among them).
MAX_VOXELS = 2**31 // 32


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Attributes:
        weights: the file to read.
        out: the folder to write into; None: ``build/engines/<weights stem>``.
        shape: (D, H, W) of the engine's grid; None: the one the weights were trained on.
        formats: of :data:`FORMATS`.
        precisions: of :data:`PRECISIONS`.
        overwrite: replace what is already there.

    Raises:
        UsageError: for a shape, format or precision that cannot be exported.
    """

    weights: Path
    out: Path | None = None
    shape: tuple[int, int, int] | None = None
    formats: tuple[str, ...] = FORMATS
    precisions: tuple[str, ...] = PRECISIONS
    overwrite: bool = False

    def __post_init__(self) -> None:
        for what, values, known in (
            ("format", self.formats, FORMATS),
            ("precision", self.precisions, PRECISIONS),
        ):
            for value in values:
                if value not in known:
                    raise UsageError(
                        f"{what} is {value!r}, expected one of {', '.join(known)}",
                        "this version exports no other",
                    )
        if self.shape is not None:
            check_shape(self.shape)

    @property
    def folder(self) -> Path:
        """Where the artefacts go."""
        return self.out if self.out is not None else DEFAULT_FOLDER / self.weights.stem


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
