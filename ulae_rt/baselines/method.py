"""Affine only, ANTs SyN and greedy: what registers pairs in the network's place."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ulae_rt.baselines.options import BASELINES, BaselineName
from ulae_rt.baselines.packages import GREEDY, Job
from ulae_rt.baselines.process import PackageProcess
from ulae_rt.clock import Clock
from ulae_rt.conventions import AffineMode
from ulae_rt.errors import UsageError
from ulae_rt.imaging.affine import register_affine
from ulae_rt.imaging.grid import Displacement
from ulae_rt.imaging.scan import Scan, as_volume
from ulae_rt.imaging.transform import Deformation, in_mm
from ulae_rt.messages import about
from ulae_rt.optional import require
from ulae_rt.registration.registrar import (
    Prepared,
    Target,
    brain_scan,
    moving_scan,
)

# Name -> (module, distribution, what it is called with).
PACKAGES = {
    "syn": (
        "ants",
        "antspyx",
        "registration(type_of_transform='SyNOnly') with its defaults: Mattes mutual information "
        "of 32 bins, 40x20x0 iterations, gradient step 0.2, flow sigma 3",
    ),
    "greedy": ("picsl_greedy", "picsl_greedy", GREEDY),
}


class Baseline:
    """Registers pairs with a method of another package, for comparison with the network.

    All start from the affine that the network starts from, so that what differs is the deformable
    part: ``affine`` has none; ``syn`` is `PACKAGES`' of antspyx, ``greedy`` that of picsl-greedy.
    Both work on the scans' own grids and values, in a process of their own with all the
    processors that this one may use.

    Args:
        name: of `BASELINES`.
        affine: see `ulae_rt.imaging.affine.register_affine`.

    Raises:
        UsageError: an unknown name.
        BackendUnavailable: the package is not installed.
    """

    at_once = 1

    def __init__(self, name: BaselineName, affine: AffineMode = "affine") -> None:
        if name not in BASELINES:
            raise UsageError(
                f"the baseline is {name!r}, expected one of {', '.join(BASELINES)}",
                "'affine' needs no other package, 'syn' and 'greedy' need 'ulae-rt[baselines]'",
            )
        self.affine: AffineMode = affine
        self._name = name
        self._process: PackageProcess | None = None
        self.description = "affine alignment only"
        if name != "affine":
            module, distribution, called = PACKAGES[name]
            require(module, "baselines")
            self.description = f"{distribution} {version(distribution)}: {called}"
            self._process = PackageProcess(name, len(os.sched_getaffinity(0)))

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on."""
        return {"method": self._name, "made_by": self.description, "affine": self.affine}

    def target(self, fixed: Scan) -> Target:
        """Read a fixed scan, for any number of moving ones."""
        volume = as_volume(fixed, "fixed")
        return Target(brain_scan(volume, "cpu"))

    def prepare(self, moving: Scan, fixed: Target, *, labels: Scan | None = None) -> Prepared:
        """Read a pair and align it affinely."""
        clock = Clock()
        with clock("read"):
            volume = as_volume(moving, "moving")
            label_volume = None if labels is None else as_volume(labels, "labels", "labels")
        with clock("preprocess"), about(volume.name):
            scan = moving_scan(volume, fixed, label_volume)
        with clock("affine"), about(volume.name):
            affine = register_affine(scan.cleaned, fixed.scan.cleaned, self.affine)
        return Prepared(scan, fixed, label_volume, affine, clock.seconds)

    def deform(self, pairs: Sequence[Prepared]) -> list[Deformation]:
        """Find the deformation of each, one after the other.

        Raises:
            BaselineError: the package failed.
        """
        return [self._deform(pair) for pair in pairs]

    def _deform(self, pair: Prepared) -> Deformation:
        moving, fixed = pair.moving.cleaned_volume, pair.target.scan.cleaned_volume
        grid = pair.target.scan.image.grid
        if self._process is None:
            return Deformation(torch.zeros(1, 3, *grid.shape), grid, pair.affine)
        u_mm: Displacement = self._process.run(
            Job(
                np.asarray(moving.data, np.float32),
                moving.affine,
                np.asarray(fixed.data, np.float32),
                fixed.affine,
                pair.affine,
            )
        )
        to_voxels = torch.from_numpy(np.linalg.inv(grid.affine[:3, :3]).astype(np.float32))
        disp = torch.einsum("ij,bjdhw->bidhw", to_voxels, in_mm(u_mm))
        return Deformation(disp, grid, pair.affine)
