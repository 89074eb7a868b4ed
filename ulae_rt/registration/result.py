"""What a registration gives: images, warp and figures on the fixed grid, and their files."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.arguments import PathLike, path_of
from ulae_rt.errors import UsageError
from ulae_rt.imaging.grid import Affine, grid_of
from ulae_rt.imaging.image import as_array, file_order, image_of, resample
from ulae_rt.imaging.inverse import InverseConsistency, inverse_consistency, invert
from ulae_rt.imaging.nifti import Volume, image_on_grid, save_image
from ulae_rt.imaging.transform import Deformation, as_displacement
from ulae_rt.imaging.warpfile import Warp, WarpFormat, write_warp
from ulae_rt.registration.outputs import output_files
from ulae_rt.reports import SIMILARITY, Refinement, VerdictName


@dataclass
class Stats:
    """What a registration achieved and what it took.

    Attributes:
        similarity_before: `SIMILARITY` of fixed and moving through the affine only, -1 to 1.
        similarity_after: the same of fixed and moved.
        overlap: Dice of the two brains through the affine, 0 to 1.
        folding_percent: voxels of the fixed brain with a Jacobian determinant of 0 or less.
        folding_image_percent: the same of all voxels of the fixed image.
        verdict: what the registration is worth, see `ulae_rt.registration.verdict`.
        refinement: how the network's displacement was improved; None where it was not asked for.
        seconds: wall-clock time of each stage.
    """

    similarity_before: float
    similarity_after: float
    overlap: float
    folding_percent: float
    folding_image_percent: float
    verdict: VerdictName
    refinement: Refinement | None = None
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
        deformation: the network's displacement on its own grid, and the affine.
        fixed: the fixed image.
        moving: the moving image.
        brain: (X, Y, Z), where the fixed brain is.
    """

    moved: nib.Nifti1Image
    warp: Warp
    jacobian: NDArray[np.float32]
    affine: Affine
    stats: Stats
    moved_labels: nib.Nifti1Image | None
    deformation: Deformation
    fixed: Volume
    moving: Volume
    brain: NDArray[np.bool_]

    @cached_property
    def before(self) -> NDArray[np.float32]:
        """(X, Y, Z), the moving image through the affine alone."""
        grid = file_order(grid_of(self.fixed))
        return as_array(resample(image_of(self.moving), grid, self.affine))

    @cached_property
    def inverse(self) -> Warp:
        """The warp back, on the moving image's own grid; see `ulae_rt.imaging.inverse.invert`.

        Moving point y comes from fixed point y + disp(y). Found when it is first asked for.
        """
        moving = grid_of(self.moving)
        return Warp(invert(self.deformation, moving), self.moving, grid_of(self.fixed))

    @cached_property
    def inverse_consistency(self) -> InverseConsistency:
        """How far from where it began a point of the fixed brain ends, there and back."""
        fixed, moving = grid_of(self.fixed), grid_of(self.moving)
        return inverse_consistency(self.warp.disp, fixed, self.inverse.disp, moving, self.brain)

    def save(
        self,
        moved: PathLike | None = None,
        warp: PathLike | None = None,
        *,
        inverse_warp: PathLike | None = None,
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
            moved: ``.nii`` or ``.nii.gz``, as all but the picture; a warp of format l2r may be
                ``.npz`` too.
            warp: in the form that ``warp_format`` names.
            inverse_warp: the same of `inverse`.
            moved_labels: needs labels given to the registrar.
            jacobian: determinant of the warp's derivative.
            qc: ``.png``, the picture of `ulae_rt.imaging.qc`.
            caption: the picture's.
            warp_format: see `ulae_rt.imaging.warpfile.warp_to_image`.
            overwrite: replace files that exist.
            inputs: files that must not be written to, beside the two scans.

        Raises:
            UsageError, OutputError: see `ulae_rt.imaging.nifti.check_output`.
        """
        places = {
            "warp": warp,
            "inverse_warp": inverse_warp,
            "moved": moved,
            "jacobian": jacobian,
            "moved_labels": moved_labels,
            "qc": qc,
        }
        wanted = {kind: path_of(path, kind) for kind, path in places.items() if path is not None}
        if not isinstance(overwrite, bool):
            raise UsageError(f"overwrite is {overwrite!r}, expected True or False", "leave it out")
        if warp_format != "itk" and not wanted.keys() & {"warp", "inverse_warp"}:
            raise UsageError(
                f"warp_format is {warp_format!r}, and no warp is written",
                "give a path for warp or inverse_warp too, or leave it out",
            )
        if moved_labels is not None:
            self._labels()
        # Its own scans must survive it.
        read = [scan.path for scan in (self.moving, self.fixed) if scan.path is not None]
        # The warps take longest to pack, so they go first.
        write: dict[str, Callable[[Path], None]] = {
            "warp": lambda path: write_warp(self.warp, path, warp_format),
            "inverse_warp": lambda path: write_warp(self.inverse, path, warp_format),
            "moved": lambda path: save_image(self.moved, path),
            "jacobian": lambda path: save_image(image_on_grid(self.jacobian, self.fixed), path),
            "moved_labels": lambda path: save_image(self._labels(), path),
        }
        with output_files(wanted, warp_format, overwrite, [*inputs, *read]) as outputs:
            hidden = {kind: outputs.temporary(path) for kind, path in wanted.items()}
            with ThreadPoolExecutor(WRITERS) as pool:
                jobs = [pool.submit(write[kind], hidden[kind]) for kind in write if kind in hidden]
                if "qc" in hidden:
                    self._draw(hidden["qc"], caption)
                for job in jobs:
                    job.result()
            return outputs.commit()

    def _labels(self) -> nib.Nifti1Image:
        if self.moved_labels is None:
            raise UsageError("there are no moved labels", "give labels to the registrar")
        return self.moved_labels

    def _draw(self, path: Path, caption: str) -> None:
        from ulae_rt.imaging.qc import qc_figure  # matplotlib takes half a second to import

        qc_figure(
            path,
            fixed=self.fixed.data,
            before=self.before,
            after=np.asanyarray(self.moved.dataobj),
            disp=as_displacement(self.deformation.network_part(file_order(grid_of(self.fixed)))),
            jacobian=self.jacobian,
            affine=self.fixed.affine,
            caption=caption,
        )


# Packing releases the interpreter; more threads than files that matter would only hold memory.
WRITERS = 2
