"""Which baselines there are, and what one is opened with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ulae_rt.conventions import AffineMode
from ulae_rt.optional import require

if TYPE_CHECKING:
    from ulae_rt.baselines.method import Baseline

BaselineName = Literal["affine", "syn", "greedy"]
BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)


@dataclass(frozen=True)
class BaselineOptions:
    """What a `Baseline` is opened with; can be sent to another process.

    Attributes:
        name: of `BASELINES`.
        affine: see `ulae_rt.imaging.affine.register_affine`.
    """

    name: BaselineName
    affine: AffineMode = "affine"

    @property
    def on_gpu(self) -> bool:
        """Whether it can use a GPU."""
        return False

    def open(self) -> "Baseline":
        """Check that its package and torch are there.

        Raises:
            BackendUnavailable: one of them is not.
        """
        require("torch", "torch")
        from ulae_rt.baselines.method import Baseline  # loads torch

        return Baseline(self.name, self.affine)
