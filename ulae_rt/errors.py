"""Every error a caller can cause. Message: what, expected, got; hint: what to do."""

from typing import Any


class UlaeError(Exception):
    """A mistake of the caller's or a limit of the machine: shown as one line and a hint.

    Args:
        message: what was wrong, what was expected, what was got; one line.
        hint: what to do about it; one line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(UlaeError, ValueError):
    """An argument or a combination of arguments that makes no sense (exit status 2)."""


class ShapeError(UlaeError, ValueError):
    """A tensor whose shape does not fit."""


class DtypeError(UlaeError, TypeError):
    """A tensor whose type does not fit."""


class IntensityError(UlaeError, ValueError):
    """Images whose intensities are not those that a network is made for."""


class ImageError(UlaeError, ValueError):
    """A file that is not a usable brain volume."""


class GeometryError(ImageError):
    """An affine or a grid that cannot be used."""


class PairsError(UlaeError, ValueError):
    """A list of pairs, or the results of one, that cannot be used."""


class BatchError(UlaeError, RuntimeError):
    """Pairs of a batch that failed.

    Args:
        message, hint: as of every error.
        result: what the command says of those that did not, as JSON.
    """

    def __init__(self, message: str, hint: str, result: dict[str, Any]) -> None:
        super().__init__(message, hint)
        self.result = result


class EvaluationError(UlaeError, ValueError):
    """A protocol, landmarks or registrations that cannot be evaluated."""


class OutputError(UlaeError, OSError):
    """An output path that cannot or must not be written."""


class DiskFull(OutputError):
    """No room for an output: nothing else can be written there either."""


class CheckpointError(UlaeError, ValueError):
    """A weights file that is missing, damaged, unsafe or of another network."""


class ConfigError(UlaeError, ValueError):
    """A training configuration that cannot be used."""


class TrainingError(UlaeError, RuntimeError):
    """A training run that cannot go on."""


class BackendUnavailable(UlaeError, RuntimeError):
    """A device, a library or a kernel that was asked for and is not there."""


class BaselineError(UlaeError, RuntimeError):
    """Another package that failed to register a pair."""


class ExportError(UlaeError, RuntimeError):
    """An artefact that could not be made."""


class EquivalenceError(ExportError):
    """An artefact whose results differ from the reference by more than the tolerance."""


class EngineMismatch(UlaeError, RuntimeError):
    """An engine that does not fit its manifest, the inputs or this machine."""


class OutOfMemory(EngineMismatch):
    """A network that the memory of its device does not suffice for."""
