"""Whether a registration can be believed, and what is said of one that hardly can."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ulae_rt.imaging.grid import Affine
from ulae_rt.reports import VerdictName

logger = logging.getLogger(__name__)

# bench/NOTES.md has the pairs and the spoilt inputs that these were taken from.
TURN_DEG = 40.0
AXIS_SCALE = (0.7, 1.4)
VOLUME_SCALE = (0.5, 2.0)
SIMILARITY_AFFINE = 0.42
SIMILARITY = 0.74
OVERLAP = 0.9
# Less than this, and nothing has been aligned.
FAILED_SIMILARITY = 0.3
FAILED_OVERLAP = 0.4

HINT = (
    "look at the result (register --qc, or batch's summary.html), and check that both images show "
    "one whole skull-stripped T1 brain, the right way up by its header"
)


@dataclass(frozen=True)
class Signs:
    """What a registration is judged by.

    Attributes:
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        overlap: Dice of the two brains through the affine, 0 to 1.
        before: `ulae_rt.reports.SIMILARITY` through the affine alone.
        after: the same in the end; None where there is nothing but the affine.
    """

    affine: Affine
    overlap: float
    before: float
    after: float | None


@dataclass(frozen=True)
class Verdict:
    """What a registration is worth.

    Attributes:
        name: ``good``; ``doubtful``, where a person should look at it; ``failed``, where nothing
            that is known of it speaks for it.
        reasons: why it is not good: what it is like, and what is usual.
    """

    name: VerdictName
    reasons: tuple[str, ...]


def judge(signs: Signs, moving: str, fixed: str) -> Verdict:
    """Hold a registration against what is usual.

    Args:
        signs: of the registration.
        moving: name of the moving image.
        fixed: name of the fixed image.
    """
    reasons = []
    implausible = affine_reason(signs.affine, moving, fixed)
    if implausible:
        reasons.append(implausible)
    if signs.overlap < OVERLAP:
        reasons.append(
            f"the brains of {moving} and {fixed} overlap by only {signs.overlap:.2f} (Dice) after "
            f"the affine, expected {OVERLAP} or more of two whole brains without skull"
        )
    unlike = unlike_reason(signs.before, signs.after, moving, fixed)
    if unlike:
        reasons.append(unlike)
    reached = signs.before if signs.after is None else signs.after
    failed = (
        signs.overlap < FAILED_OVERLAP
        or (reached < FAILED_SIMILARITY and signs.overlap >= OVERLAP)
        or bool(implausible and unlike)
    )
    name: VerdictName = "failed" if failed else "doubtful" if reasons else "good"
    return Verdict(name, tuple(reasons))


def tell(reasons: Sequence[str]) -> None:
    """Log reasons as warnings, with what to check."""
    for reason in reasons:
        logger.warning("%s: %s", reason, HINT)


def affine_reason(matrix: Affine, moving: str, fixed: str) -> str:
    """That an affine turns or scales a brain by more than can be believed; empty if not.

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
    if not doubts:
        return ""
    return f"the affine from {moving} to {fixed} {' and '.join(doubts)}, which is hard to believe"


def unlike_reason(before: float, after: float | None, moving: str, fixed: str) -> str:
    """That two images are still unlike each other once they are registered; empty if not.

    Args:
        before: `ulae_rt.reports.SIMILARITY` through the affine alone.
        after: the same in the end; None where there is nothing but the affine.
        moving: name of the moving image.
        fixed: name of the fixed image.
    """
    reached, expected = (before, SIMILARITY_AFFINE) if after is None else (after, SIMILARITY)
    if reached >= expected:
        return ""
    return (
        f"{moving} and {fixed} have a similarity of only {reached:.2f} once they are registered, "
        f"expected {expected:.2f} or more"
    )
