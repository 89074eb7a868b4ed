"""Writing artefacts: each with its manifest, whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ulae_rt.errors import OutputError
from ulae_rt.files import locked_folders


def check_folder(folder: Path, option: str = "--out") -> None:
    """That ``folder`` is one, or can be made, and that files can be written into it.

    Args:
        folder: which need not be there.
        option: that named it, for the hint.

    Raises:
        OutputError: naming what is in the way.
    """
    hint = f"give another {option}"
    try:
        above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if not above.is_dir():
            raise OutputError(f"{above}: is a file, expected a folder", hint)
        if folder.is_symlink() and not folder.exists():
            raise OutputError(f"{folder}: is a link to a folder that is not there", hint)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: cannot be written ({error.strerror})", hint) from error
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{above}: no permission to write there", hint)


def check_writable(paths: Iterable[Path], overwrite: bool) -> None:
    """Before minutes of work, not after them.

    Raises:
        OutputError: if a file is there already, or its folder cannot be written.
    """
    for path in paths:
        check_folder(path.parent)
        if path.is_dir():
            raise OutputError(f"{path}: is a folder, expected a file", "give another --out")
        if (path.exists() or path.is_symlink()) and not overwrite:
            raise OutputError(f"{path}: is there already", "pass --overwrite, or another --out")


def publish(
    folder: Path,
    files: dict[str, bytes],
    check: Callable[[], None],
    afterwards: Callable[[], dict[str, bytes]],
) -> None:
    """Write files into a folder: beside their places first, then renamed together.

    Other exports into the folder wait while ``check`` looks at it, the files are renamed and what
    ``afterwards`` makes of the folder is written.

    Args:
        folder: made where it is not there.
        files: name to content.
        check: raises where the files may not be written, now that nobody else writes.
        afterwards: further files, by what is then in the folder; they replace what is there.

    Raises:
        OutputError: if one cannot be written; then none is, and what was there is there still.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as beside:
            written = [_write(Path(beside), name, files[name]) for name in files]
            with locked_folders([folder]):
                check()
                _exchange(written, folder, Path(beside))
                for name, content in afterwards().items():
                    _write(Path(beside), name, content).replace(folder / name)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror})",
            "free some space or give another --out",
        ) from error


def _write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _exchange(written: list[Path], folder: Path, beside: Path) -> None:
    """Rename all into ``folder``, or none."""
    done: list[Path] = []
    try:
        for path in written:
            place = folder / path.name
            if place.exists() or place.is_symlink():
                place.rename(beside / f"old {path.name}")
            done.append(place)
            path.replace(place)
    except OSError:
        for place in done:
            with suppress(OSError):
                place.unlink(missing_ok=True)
                if (old := beside / f"old {place.name}").exists():
                    old.rename(place)
        raise
