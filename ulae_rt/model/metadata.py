"""What a weights file says about itself: enough to run it and to know whether one may."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ulae_rt import __version__
from ulae_rt.conventions import FULL_SHAPE, FULL_SPACING_MM
from ulae_rt.errors import CheckpointError
from ulae_rt.manifest import LARGEST_SIZE, NORMALISATIONS, VARIANTS
from ulae_rt.strict_json import parse_json


@dataclass(frozen=True)
class Metadata:
    """The architecture's switches, the grid and intensities the weights were made for, and origin.

    Attributes:
        variant, channels, accumulate, uncoupled: arguments of :class:`ulae_rt.model.UlaeNet`.
        shape: (D, H, W) of the grid the weights were trained on.
        spacing_mm: edge of that grid's cubic voxels, a whole number.
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
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> "Metadata":
        """Read :meth:`to_json`'s form; ``source`` names the file in errors.

        Raises:
            CheckpointError: if a value is missing, of another type, or impossible.
        """
        try:
            values = parse_json(text)
            if not isinstance(values, dict):
                raise ValueError(f"it is {_told(values)}, expected an object")
            fields = {field.name for field in dataclasses.fields(cls)}
            if missing := sorted(fields - values.keys() - _MAY_BE_MISSING):
                raise ValueError(f"it has no {missing[0]!r}")
            if unknown := sorted(values.keys() - fields):
                raise ValueError(f"it has an unknown {unknown[0]!r}")
            _check(values)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{source}: its metadata cannot be read: {error}",
                "the file was not written by this project, or by a newer version of it",
            ) from error
        shape = tuple(values["shape"])
        return cls(**{**values, "shape": shape, "spacing_mm": float(values["spacing_mm"])})


_MAY_BE_MISSING = {"training_data", "licence", "recipe", "versions"}
_LARGEST_CHANNELS = 1024
_TYPES: dict[str, type | tuple[type, ...]] = {
    "variant": str, "channels": int, "accumulate": bool, "uncoupled": bool, "shape": list,
    "spacing_mm": (int, float), "normalisation": str, "training_data": str, "licence": str,
    "recipe": dict, "versions": dict,
}  # fmt: skip


def _check(values: dict[str, Any]) -> None:
    """That every value is of its type and possible.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        kind = _TYPES[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is {_told(value)}, expected {expected}")
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written
    for name, known in (("variant", VARIANTS), ("normalisation", NORMALISATIONS)):
        if values[name] not in known:
            raise ValueError(f"{name} is {values[name]!r}, expected one of {', '.join(known)}")
    if not 1 <= values["channels"] <= _LARGEST_CHANNELS:
        raise ValueError(
            f"channels is {_told(values['channels'])}, expected 1 to {_LARGEST_CHANNELS}"
        )
    shape, spacing = values["shape"], values["spacing_mm"]
    if len(shape) != 3 or not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in shape):
        raise ValueError(
            f"shape is {str(shape)[:60]}, expected three whole numbers from 1 to {LARGEST_SIZE}"
        )
    if not 0 < spacing <= LARGEST_SIZE:  # NaN is not either
        raise ValueError(f"spacing_mm is {_told(spacing)}, expected more than 0 mm")
    for name, version in values.get("versions", {}).items():
        if not isinstance(version, str):
            raise ValueError(f"the version of {name!r} is {_told(version)}, expected str")


def _told(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
