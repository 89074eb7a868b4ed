"""Writing artefacts: each with its manifest, whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from ulae_rt.errors import OutputError


def check_writable(paths: Iterable[Path], overwrite: bool) -> None:
    """Before minutes of work, not after them.

    Raises:
        OutputError: if a file is there already, or its folder cannot be written.
    """
    for path in paths:
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: is there already", "pass --overwrite, or another --out")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise OutputError(f"{folder}: is a file, expected a folder", "give another --out")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: no permission to write there", "give another --out")


def publish(files: dict[Path, bytes]) -> None:
    """Write all files beside their places, then rename them.

    Raises:
        OutputError: if one cannot be written; then none is.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_bytes(content)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{error.filename or path}: cannot be written ({error.strerror})",
            "free some space or give another --out",
        ) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
