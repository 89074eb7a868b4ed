"""What a registration gives: images, warp and figures on the fixed grid, and their files."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import UsageError
from ulae_rt.imaging.grid import Affine, grid_of
from ulae_rt.imaging.nifti import Outputs, PathLike, Volume, image_on_grid, save_image
from ulae_rt.imaging.transform import Deformation
from ulae_rt.imaging.warpfile import Warp, WarpFormat, warp_to_image

SIMILARITY = "Pearson correlation inside the fixed brain"


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
