"""What one layer tells another of its work: records that need no library."""

from dataclasses import dataclass
from typing import Literal

# What a registration's similarity is, for people.
SIMILARITY = "Pearson correlation inside the fixed brain"
# What it is worth; see `ulae_rt.registration.verdict`.
VerdictName = Literal["good", "doubtful", "failed"]


@dataclass(frozen=True)
class Refinement:
    """How a network's displacement was improved for its own pair.

    Attributes:
        iterations: done.
        lncc_before, lncc_after: local correlation of the fixed and the moved image on the finest
            grid that was reached; 0 where there is none.
        ended: why there are no more iterations.
        seconds: wall-clock time.
        kept_back: whether ``ended`` is for the user to know: less was done than was asked for.
    """

    iterations: int
    lncc_before: float
    lncc_after: float
    ended: str
    seconds: float
    kept_back: bool = False
