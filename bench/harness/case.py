"""What is compared: a piece of work, several ways to do it, and what came of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Sizes = tuple[int, int, int]
# Of the package; every other contender is what its user has without it.
PACKAGE = "ulae_rt"
RELEASED = "released"
FULL: Sizes = (160, 192, 160)
Status = Literal["timed", "left out", "failed", "wrong"]


class LeftOut(Exception):
    """A suite, a case or a contender that this machine cannot run, and why."""


@dataclass(frozen=True)
class Setting:
    """What a run was asked for.

    Attributes:
        small: tiny volumes and one pair of everything: whether it runs, not how fast.
        rounds: in which each contender is timed, where time allows.
        device: ``cuda`` or ``cpu``.
    """

    small: bool
    rounds: int
    device: str


@dataclass(frozen=True)
class Outcome:
    """What came of one contender.

    Attributes:
        status: ``wrong``: its result is not what it should be, so it was not timed.
        why: it was not timed.
        seconds: of each round, of one run; on a GPU with cold caches.
        hot: the same with what it reads in the caches already.
        stages: seconds of each round by stage of the run.
        first_seconds: until its first result was there, everything it builds first included.
        error: of its result, in the case's unit.
        peak_gb: largest memory of its process, with what it takes for itself to start.
        gpu_peak_gb: largest memory of the GPU.
        how: it was timed, where a case's contenders are timed in several ways.
    """

    status: Status = "timed"
    why: str = ""
    seconds: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    first_seconds: float | None = None
    error: float | None = None
    peak_gb: float | None = None
    gpu_peak_gb: float | None = None
    how: str = ""


@dataclass(frozen=True)
class Measured:
    """What came of a case.

    Attributes:
        outcomes: by contender.
        bytes: that must be read and written, each once, whoever does it.
        flops: twice the multiplications with an addition.
    """

    outcomes: Mapping[str, Outcome]
    bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison: the same work on the same input, by several contenders in turn.

    Attributes:
        suite: it belongs to.
        name: of the work.
        contenders: names, in the order in which they are shown.
        measure: given the rounds, times all of them in turn and says what came of each.
        sizes: voxels of a volume.
        batch: pairs of volumes that one run takes.
        precision: of what is read.
        baseline: the contender that the others are compared with; "": there is none.
        own: the contenders that are this package.
        goal: what was asked for; shown, never asserted.
        error_unit: of the contenders' errors.
        about_seconds: that it takes on two cores; where less time is left it is not begun.
        series: of cases that differ in one number only, for the exponent of the cost.
        x: that number, such as voxels.
    """

    suite: str
    name: str
    contenders: tuple[str, ...]
    measure: Callable[[int], Measured]
    sizes: Sizes
    batch: int = 1
    precision: str = "fp32"
    baseline: str = ""
    own: tuple[str, ...] = (PACKAGE,)
    goal: str = ""
    error_unit: str = ""
    about_seconds: float = 30.0
    series: str = ""
    x: float | None = None

    @property
    def id(self) -> str:
        """Names it among all cases, on every machine."""
        size = "x".join(map(str, (self.batch, *self.sizes)))
        return f"{self.suite}: {self.name}, {self.precision}, {size}"
