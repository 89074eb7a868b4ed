"""Carry further images or label maps through saved warps and affines, in one interpolation."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ulae_rt.errors import GeometryError, UsageError
from ulae_rt.imaging.chain import (
    away_mm,
    chain_displacement,
    needs_format,
    read_transform,
    transform_path,
)
from ulae_rt.imaging.grid import Displacement, Grid, Interpolation, grid_of
from ulae_rt.imaging.image import Image, as_array, file_order, image_of, labels_of
from ulae_rt.imaging.nifti import (
    Outputs,
    Volume,
    check_exact_labels,
    check_single_precision,
    image_on_grid,
    read_grid,
    read_volume,
    save_image,
)
from ulae_rt.imaging.transform import in_mm, warp_image
from ulae_rt.imaging.warpfile import WARP_FORMATS

if TYPE_CHECKING:
    from ulae_rt.cli import Report

logger = logging.getLogger(__name__)

INTERPOLATIONS = ("linear", "nearest")
# Of two neighbours in a head, so often the values are equal: 0.8 to 0.95 of labels, below 0.1 of
# scans.
ALIKE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt apply``."""
    parser.add_argument(
        "-i", "--image", type=Path, action="append", required=True, metavar="IMAGE",
        help="image or label map in the moving image's space; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "-r", "--reference", type=Path, required=True, metavar="REFERENCE",
        help="image whose grid the outputs lie on: the fixed image, a crop of it or another "
        "resolution of it",
    )  # fmt: skip
    parser.add_argument(
        "-t", "--transform", action="append", required=True, metavar="WARP",
        help="warp (.nii, .nii.gz, Learn2Reg's .npz) or ITK transform (.mat, .txt, .tfm, .xfm, "
        ".h5). May be repeated, in the order of antsApplyTransforms: the image goes through the "
        "last named first, as in -t 1Warp.nii.gz -t 0GenericAffine.mat. [FILE,1] is the inverse "
        "of an affine",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, action="append", required=True, metavar="OUT",
        help="written, one for each IMAGE, in their order",
    )  # fmt: skip
    parser.add_argument(
        "--interp", choices=INTERPOLATIONS, default="linear",
        help="linear writes float32; nearest, for label maps, keeps the type (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--warp-format", choices=WARP_FORMATS,
        help="of a 4-D warp of another tool, which does not say it; see register",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Read the transforms, carry every image through them, and put all outputs in place."""
    images, places = arguments.image, arguments.output
    if len(images) != len(places):
        raise UsageError(
            f"there are {len(images)} -i and {len(places)} -o, expected one -o for each -i",
            "name the outputs in the order of the images",
        )
    inputs = [*images, arguments.reference, *(transform_path(t)[0] for t in arguments.transform)]
    with Outputs(places, overwrite=arguments.overwrite, inputs=inputs) as outputs:
        reference = read_grid(arguments.reference)
        grid = grid_of(reference)
        fmt = arguments.warp_format
        if fmt is not None and not any(list(map(needs_format, arguments.transform))):
            raise UsageError(
                f"--warp-format {fmt} has no effect: no transform is a 4-D warp that does not say "
                "its format itself",
                "leave --warp-format out",
            )
        steps = [
            step for text in arguments.transform for step in read_transform(text, reference, fmt)
        ]
        disp = chain_displacement(steps, grid, reference.name)
        for image, place in tqdm(
            list(zip(images, places, strict=True)), disable=None, file=sys.stderr, leave=False
        ):
            carried = _carry(read_volume(image, kind="values"), disp, grid, arguments.interp)
            save_image(image_on_grid(carried, reference), outputs.temporary(place))
        outputs.commit()
    for image, place in zip(images, places, strict=True):
        report(f"{image} -> {place}")
    return {
        "reference": str(arguments.reference),
        "transforms": arguments.transform,
        "interp": arguments.interp,
        "images": [str(path) for path in images],
        "outputs": [str(path) for path in places],
    }


def _carry(image: Volume, disp: Displacement, grid: Grid, interp: str) -> NDArray[Any]:
    if far := away_mm(disp, grid, grid_of(image)):
        raise GeometryError(
            f"the transforms lead nowhere into {image.name}: they end {far:.3g} mm away from it "
            "at least",
            "give images in the moving image's space; for those in the fixed image's space, the "
            "inverse warp and the moving image as REFERENCE",
        )
    if interp == "nearest":
        if image.data.dtype.kind in "iu":
            check_exact_labels(image.data, image.name)
        return _warped(labels_of(image), disp, grid, "nearest")
    check_single_precision(image.data, image.name)
    if _looks_like_labels(image.data):
        logger.warning(
            "%s looks like a label map: --interp nearest keeps its labels, linear mixes them",
            image.name,
        )
    return _warped(image_of(image), disp, grid, "linear")


def _warped(image: Image, disp: Displacement, grid: Grid, interp: Interpolation) -> NDArray[Any]:
    return as_array(warp_image(image, in_mm(disp), file_order(grid), interp))


def _looks_like_labels(data: NDArray[Any]) -> bool:
    """Whole numbers, most of which above 0 have a neighbour along the first axis like them."""
    if data.dtype.kind == "f" and not (data == np.rint(data)).all():
        return False
    here, there = data[:-1], data[1:]
    inside = (here != 0) & (there != 0)
    alike = np.count_nonzero(inside & (here == there))
    return bool(alike > ALIKE * np.count_nonzero(inside) > 0)


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("apply"))
