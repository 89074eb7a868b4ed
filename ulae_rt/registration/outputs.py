"""The files that a registration writes: which there are, and how each may be named."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ulae_rt.arguments import PathLike
from ulae_rt.imaging.nifti import Outputs
from ulae_rt.imaging.warpfile import WarpFormat, warp_suffixes


def output_files(
    paths: Mapping[str, Path],
    warp_format: WarpFormat,
    overwrite: bool,
    inputs: Sequence[PathLike],
) -> Outputs:
    """Check the outputs of a registration, each named as its kind demands.

    Args:
        paths: by the name that `Result.save` has for them.
        warp_format: of the warps.
        overwrite: replace files that exist.
        inputs: files that must not be written to.
    """
    warps = warp_suffixes(warp_format)
    endings = {"qc": (".png",), "warp": warps, "inverse_warp": warps}
    suffixes = {path: endings[kind] for kind, path in paths.items() if kind in endings}
    return Outputs(paths.values(), overwrite=overwrite, inputs=inputs, suffixes=suffixes)
