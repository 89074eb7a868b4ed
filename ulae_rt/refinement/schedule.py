"""Which levels a refinement goes through, and how it moves on each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """One resolution; all lengths are voxels of it.

    Attributes:
        factor: working grid's voxels along an edge of one of its own.
        iterations: at most.
        window: of the local correlation.
        step: how far a point may move in an iteration, along each axis.
        update_sigma: of the Gaussian that smooths the gradient.
        field_sigma: of the Gaussian that smooths the whole displacement after each step.
    """

    factor: int
    iterations: int
    window: int
    step: float
    update_sigma: float
    field_sigma: float


def schedule(iterations: int) -> tuple[Level, ...]:
    """Share ``iterations`` out: three of five at 2 mm, where they cost an eighth, the rest at 1 mm.

    The smoothing is what keeps the field from folding, and was chosen, as all of it, on pairs of
    people that the network was trained on.
    """
    coarse = -(-3 * iterations // 5)
    return (
        Level(2, coarse, window=3, step=0.2, update_sigma=0.7, field_sigma=0.4),
        Level(1, iterations - coarse, window=5, step=0.2, update_sigma=1.0, field_sigma=0.5),
    )
