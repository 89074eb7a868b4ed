"""What the packages are called with; runs in a process of its own, in its temporary folder."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.imaging.grid import LPS, LPS_SIGNS, Affine, Displacement
from ulae_rt.imaging.itk import affine_to_sitk, from_sitk, to_sitk
from ulae_rt.imaging.warpfile import read_warp
from ulae_rt.optional import require

# Settings of the comparison. Without -wp 0 displacements come in tenths of a voxel, which shows in
# Jacobians; without -seed the noise that it adds to flat regions is another in every run.
GREEDY = "-m NCC 2x2x2 -n 100x100x40 -s 1.6vox 0.7vox -wp 0 -seed 1"


@dataclass(frozen=True)
class Job:
    """One pair for a package.

    Attributes:
        moving, fixed: (X, Y, Z) float32, 0 outside the brain.
        moving_grid, fixed_grid: (4, 4), voxel index to RAS mm.
        affine: (4, 4), fixed RAS mm to moving RAS mm, where the package starts.
    """

    moving: NDArray[np.float32]
    moving_grid: Affine
    fixed: NDArray[np.float32]
    fixed_grid: Affine
    affine: Affine


def syn(job: Job, threads: int) -> Displacement:
    """ANTs SyN: see `ulae_rt.baselines.process.PackageProcess.run`.

    Its warp file is the part between the fixed grid and the affine, so nothing is composed.
    """
    del threads  # ITK has read them from the environment
    ants = require("ants", "baselines")
    sitk.WriteTransform(affine_to_sitk(job.affine), "affine.mat")
    found = ants.registration(
        _to_ants(ants, job.fixed, job.fixed_grid),
        _to_ants(ants, job.moving, job.moving_grid),
        "SyNOnly",
        initial_transform="affine.mat",
        outprefix="syn-",
    )
    warp, _ = found["fwdtransforms"]
    return read_warp(Path(warp)).disp


def _to_ants(ants: Any, data: NDArray[np.float32], affine: Affine) -> Any:
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return ants.from_numpy(
        data, lps[:3, 3].tolist(), spacing.tolist(), np.asarray(lps[:3, :3] / spacing)
    )


def greedy(job: Job, threads: int) -> Displacement:
    """PICSL greedy: see `ulae_rt.baselines.process.PackageProcess.run`."""
    package = require("picsl_greedy", "baselines")
    np.savetxt("affine.mat", job.affine, fmt="%.17g")  # RAS mm, as greedy has it
    registration, said = package.Greedy3D(), io.StringIO()
    registration.execute(
        f"-threads {threads} -V 0 -i fixed moving -it affine.mat {GREEDY} -o warp",
        out=said,
        err=said,
        fixed=to_sitk(job.fixed, job.fixed_grid),
        moving=to_sitk(job.moving, job.moving_grid),
        warp=None,
    )
    u_mm = from_sitk(registration["warp"]).astype(np.float32) * LPS_SIGNS
    return np.ascontiguousarray(u_mm)
