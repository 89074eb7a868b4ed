"""What a weights file says about itself: enough to run it and to know whether one may."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ulae_rt import __version__
from ulae_rt.conventions import FULL_SHAPE, FULL_SPACING_MM
from ulae_rt.errors import CheckpointError


@dataclass(frozen=True)
class Metadata:
    """The architecture's switches, the grid and intensities the weights were made for, and origin.

    Attributes:
        variant, channels, accumulate, uncoupled: arguments of :class:`ulae_rt.model.UlaeNet`.
        shape: (D, H, W) of the grid the weights were trained on.
        spacing_mm: edge of that grid's cubic voxels.
        normalisation: how intensities were brought to [0, 1] (``ulae_rt.imaging``).
        training_data: what the weights were trained on; empty when unknown.
        licence: under what terms they may be used; empty when unknown.
        recipe: free form, how they were trained.
        versions: of ulae_rt and torch that wrote the file.
    """

    variant: str = "paper"
    channels: int = 16
    accumulate: bool = True
    uncoupled: bool = True
    shape: tuple[int, int, int] = FULL_SHAPE
    spacing_mm: float = FULL_SPACING_MM
    normalisation: str = "max"
    training_data: str = ""
    licence: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"ulae_rt": __version__})

    def to_json(self) -> str:
        """One JSON object, keys sorted."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str) -> "Metadata":
        """Read :meth:`to_json`'s form; ``source`` names the file in errors."""
        try:
            values = json.loads(text)
            values["channels"] = int(values["channels"])
            values["shape"] = tuple(int(size) for size in values["shape"])
            values["spacing_mm"] = float(values["spacing_mm"])
            metadata = cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{source}: its metadata cannot be read ({error})",
                "the file was not written by this project, or by a newer version of it",
            ) from error
        if len(metadata.shape) != 3 or metadata.spacing_mm <= 0:
            raise CheckpointError(
                f"{source}: metadata says grid {metadata.shape} at {metadata.spacing_mm} mm, "
                "expected three sizes and a positive spacing"
            )
        return metadata
