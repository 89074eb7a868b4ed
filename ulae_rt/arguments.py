"""What callers give as a path, a device or a choice: taken, or refused as wrong usage."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ulae_rt.errors import UsageError

# What a path may be given as.
PathLike = str | os.PathLike[str]


def device_name(device: object, expected: str = "auto, cpu, cuda or cuda:N") -> str:
    """The name of a device, of a ``torch.device`` too.

    Args:
        device: as the caller gave it.
        expected: what a device may be, for the error.

    Raises:
        UsageError: for anything else than a string or a ``torch.device``.
    """
    # By its class's name: engines run without torch.
    kind = type(device)
    if kind.__module__ == "torch" and kind.__name__ == "device":
        return str(device)
    if isinstance(device, str):
        return device
    raise UsageError(
        f"device is {device!r}, expected {expected}", "leave it out, or name it: device='cpu'"
    )


def parse_device(device: object) -> tuple[str, int]:
    """``auto``, ``cpu`` or ``cuda``, and the number of the GPU.

    Raises:
        UsageError: for anything else.
    """
    name = device_name(device)
    kind, separator, index = name.partition(":")
    known = kind in ("auto", "cpu") and not separator
    number = index.isascii() and index.isdecimal() and len(index) < 6
    if known or (kind == "cuda" and (number or not separator)):
        return kind, int(index or 0)
    raise UsageError(
        f"device is {name!r}, expected auto, cpu, cuda or cuda:N",
        "leave it out, or name it: device='cpu'",
    )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a ``value`` that is none of the ``choices``.

    Raises:
        UsageError: with what there is to choose from.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise UsageError(
            f"{name} is {value!r}, expected one of {', '.join(choices)}",
            "leave it out, or give one of them",
        )


def path_of(value: object, name: str = "path") -> Path:
    """A path given as a string or as anything that stands for a path.

    Raises:
        UsageError: for anything else, an empty string or one with a null character.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise UsageError(
            f"{name} is {type(value).__name__} {str(value)[:40]!r}, expected a path",
            "give a string or a pathlib.Path",
        )
    if not text or "\0" in text:
        raise UsageError(f"{name} is {text!r}, expected a path", "name a file or a folder")
    return Path(text)


def what_is_at(path: Path) -> str:
    """``file``, ``folder``, or in words why neither of them is there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to a file that is not there" if path.is_symlink() else "not there"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "neither a file nor a folder"
