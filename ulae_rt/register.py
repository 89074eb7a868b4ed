"""Register one pair of NIfTI scans of any size, spacing and orientation."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ulae_rt.allocator import keep_freed_memory
from ulae_rt.clock import Clock
from ulae_rt.env import let_torch_threads_sleep
from ulae_rt.errors import UsageError
from ulae_rt.imaging.grid import grid_of
from ulae_rt.imaging.scan import as_volume
from ulae_rt.imaging.warpfile import WARP_FORMATS, WarpFormat, check_one_grid
from ulae_rt.options import NetworkOptions
from ulae_rt.registration.outputs import output_files
from ulae_rt.reports import SIMILARITY

if TYPE_CHECKING:
    from ulae_rt.cli import Report

OUTPUTS = ("moved", "warp", "inverse_warp", "moved_labels", "jacobian", "qc")
STAGES = ("read", "load", "affine", "preprocess", "network", "refine", "warp", "inverse", "write")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt register``."""
    files = parser.add_argument_group(
        "files", "NIfTI; all that is written lies on FIXED's grid, the inverse warp on MOVING's"
    )
    files.add_argument("-m", "--moving", type=Path, required=True, help="scan that is aligned")
    files.add_argument("-f", "--fixed", type=Path, required=True, help="scan it is aligned to")
    files.add_argument("-o", "--moved", type=Path, required=True, help="MOVING aligned (written)")
    files.add_argument("-w", "--warp", type=Path, help="displacement, affine included (written)")
    files.add_argument(
        "--inverse-warp", type=Path, metavar="OUT", help="displacement that undoes it (written)"
    )
    files.add_argument("--labels", type=Path, metavar="SEG", help="label map of MOVING")
    files.add_argument("--moved-labels", type=Path, metavar="OUT", help="SEG aligned (written)")
    files.add_argument(
        "--jacobian", type=Path, metavar="OUT",
        help="Jacobian determinant (written), not its logarithm: below 1 where the moving image "
        "is expanded to fit, above 1 where it is compressed, 0 or less where the warp folds",
    )  # fmt: skip
    files.add_argument("--qc", type=Path, metavar="PNG", help="picture to judge it by (written)")
    files.add_argument(
        "--warp-format", choices=WARP_FORMATS,
        help="of the warps; itk: 5-D LPS mm for ITK, ANTs, Slicer; ras: 4-D RAS mm; voxel: 4-D; "
        "l2r: Learn2Reg, for images on one grid, .nii.gz or .npz (itk)",
    )  # fmt: skip
    files.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    NetworkOptions.add_to(parser)


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Register, write, and say how well it went."""
    if (arguments.labels is None) != (arguments.moved_labels is None):
        raise UsageError("--labels and --moved-labels must come together", "give both, or neither")
    if arguments.qc is not None and arguments.qc.suffix.lower() != ".png":
        raise UsageError(f"--qc is {arguments.qc}, expected a .png file", "rename it")
    if arguments.warp_format and arguments.warp is None and arguments.inverse_warp is None:
        raise UsageError(
            f"--warp-format {arguments.warp_format} is given, and no warp is written",
            "give --warp or --inverse-warp too, or leave --warp-format out",
        )
    warp_format: WarpFormat = arguments.warp_format or "itk"
    wanted = {n: getattr(arguments, n) for n in OUTPUTS if getattr(arguments, n) is not None}
    inputs = [p for p in (arguments.moving, arguments.fixed, arguments.labels) if p is not None]
    output_files(wanted, warp_format, arguments.overwrite, inputs)
    network = NetworkOptions.of(arguments)
    keep_freed_memory()
    let_torch_threads_sleep()

    with _progress() as step:
        clock = Clock(step)
        # Before the network: a bad scan is said at once, not after torch has loaded.
        with clock("read"):
            moving = as_volume(arguments.moving, "moving")
            fixed = as_volume(arguments.fixed, "fixed")
            labels = as_volume(arguments.labels, "labels", "labels") if arguments.labels else None
            if warp_format == "l2r" and wanted.keys() & {"warp", "inverse_warp"}:
                check_one_grid(grid_of(fixed), grid_of(moving))
        with clock("load"):
            registrar = network.open()
        result = registrar(moving, fixed, labels=labels, progress=step)
        stats = result.stats
        before, after = stats.similarity_before, stats.similarity_after
        consistency = None
        if "inverse_warp" in wanted:
            with clock("inverse"):
                consistency = result.inverse_consistency
        with clock("write"):
            result.save(
                **wanted,
                caption=f"{arguments.moving.name} to {arguments.fixed.name}: correlation "
                f"{before:.3f} to {after:.3f}, {stats.folding_percent:.2f} % of the brain folded",
                warp_format=warp_format,
                overwrite=arguments.overwrite,
                inputs=inputs,
            )
    parts = (clock.seconds, stats.seconds)
    taken = {
        stage: sum(part.get(stage, 0.0) for part in parts)
        for stage in STAGES
        if any(stage in part for part in parts)
    }
    stats.seconds = taken
    report(f"network     {registrar.network.description}")
    report(f"similarity  {before:.4f} before, {after:.4f} after ({SIMILARITY})")
    report(f"verdict     {stats.verdict}; the brains overlap by {stats.overlap:.3f} (Dice)")
    if stats.refinement is not None:
        how = stats.refinement
        report(
            f"refined     {how.iterations} iterations, local correlation {how.lncc_before:.4f} to "
            f"{how.lncc_after:.4f}; {how.ended}"
        )
    report(
        f"folding     {stats.folding_percent:.3f} % of the brain, "
        f"{stats.folding_image_percent:.3f} % of the image"
    )
    if consistency is not None:
        report(
            f"inverse     {consistency.mean_mm:.3f} mm off there and back, mean of the brain; "
            f"99 % below {consistency.p99_mm:.3f}, at most {consistency.max_mm:.3f}"
        )
    times = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in taken.items())
    report(f"seconds     {times}; {sum(taken.values()):.1f} in all")
    for name, path in wanted.items():
        report(f"{name.replace('_', ' '):<11} {path}")
    return {
        "moving": str(arguments.moving),
        "fixed": str(arguments.fixed),
        "outputs": {name: str(path) for name, path in wanted.items()},
        "warp_format": warp_format,
        "network": registrar.network.description,
        "affine_mode": arguments.affine,
        "affine": result.affine.tolist(),
        "affine_direction": "fixed RAS mm -> moving RAS mm",
        **stats.to_dict(),
        "inverse_consistency": None if consistency is None else asdict(consistency),
    }


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A bar over the stages on a terminal's stderr, nothing elsewhere."""
    with tqdm(total=len(STAGES), disable=None, file=sys.stderr, leave=False) as bar:
        started: set[str] = set()

        def step(stage: str) -> None:
            if stage.partition(" ")[0] not in started:  # "refine 7/50" is a part of one
                bar.update(len(started) - bar.n)
                started.add(stage)
            bar.set_description(stage)

        yield step


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("register"))
