"""Whether a registration can be believed: what is said of one that hardly can."""

import logging

import numpy as np

from ulae_rt.imaging.grid import Affine

logger = logging.getLogger(__name__)

# Of 20 pairs of whole T1 brains of different people the affine turned by 1 to 5 degrees, scaled an
# axis by 0.86 to 1.16 and volume by 0.71 to 1.41, and similarity was 0.46 to 0.62 after it and 0.76
# to 0.87 in the end. Of heads upside down, half brains, slabs, heads with skull and other contrasts
# it was at most 0.66 in the end.
TURN_DEG = 40.0
AXIS_SCALE = (0.7, 1.4)
VOLUME_SCALE = (0.5, 2.0)
SIMILARITY_AFFINE = 0.42
SIMILARITY = 0.74

HINT = (
    "look at the result (register --qc, or batch's summary.html), and check that both images show "
    "one whole skull-stripped T1 brain, the right way up by its header"
)


def warn_implausible_affine(matrix: Affine, moving: str, fixed: str) -> None:
    """Say so if an affine turns or scales a brain by more than can be believed.

    Args:
        matrix: (4, 4), fixed RAS mm to moving RAS mm.
        moving: name of the moving image.
        fixed: name of the fixed image.
    """
    left, scales, right = np.linalg.svd(matrix[:3, :3])
    turn = float(np.rad2deg(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1))))
    volume = float(np.linalg.det(matrix[:3, :3]))
    doubts = []
    if volume < 0:
        doubts.append("mirrors it")
    elif turn > TURN_DEG:
        doubts.append(f"turns it by {turn:.0f} degrees")
    if not VOLUME_SCALE[0] <= volume <= VOLUME_SCALE[1]:
        doubts.append(f"scales its volume by {volume:.2f}")
    elif not AXIS_SCALE[0] <= scales[-1] <= scales[0] <= AXIS_SCALE[1]:
        doubts.append(f"scales it by {scales[-1]:.2f} to {scales[0]:.2f} along its axes")
    if doubts:
        logger.warning(
            "the affine from %s to %s %s, which is hard to believe: %s",
            moving, fixed, " and ".join(doubts), HINT,
        )  # fmt: skip


def warn_unlike(before: float, after: float | None, moving: str, fixed: str) -> None:
    """Say so if two images are still unlike each other once they are registered.

    Args:
        before: `ulae_rt.result.SIMILARITY` through the affine alone.
        after: the same in the end; None where there is nothing but the affine.
        moving: name of the moving image.
        fixed: name of the fixed image.
    """
    reached, expected = (before, SIMILARITY_AFFINE) if after is None else (after, SIMILARITY)
    if reached < expected:
        logger.warning(
            "%s and %s have a similarity of only %.2f once they are registered, expected %.2f or "
            "more: %s",
            moving, fixed, reached, expected, HINT,
        )  # fmt: skip
