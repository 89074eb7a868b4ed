"""Putting written files in their places, so that two writers neither mix nor lose anything."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ulae_rt.errors import OutputError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked_folders(folders: Iterable[Path]) -> Iterator[None]:
    """Keep every other writer of this package out of ``folders`` for the length of the block.

    For the moment in which finished files are renamed: whoever comes second waits, and then finds
    what the first one wrote. The lock is of the folder itself, so that nothing is left behind, and
    it ends with the process. Where a file system has no locks the block runs without one.
    """
    handles: list[int] = []
    try:
        # In one order, so that two writers of the same folders cannot wait for each other.
        for folder in sorted({folder.resolve() for folder in folders}):
            with contextlib.suppress(OSError):
                handles.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
                fcntl.flock(handles[-1], fcntl.LOCK_EX)
        yield
    finally:
        for handle in handles:
            os.close(handle)


def lock_file(path: Path, *, shared: bool = False) -> int:
    """Open ``path`` (it is made) and lock it for a whole run, without waiting.

    The lock belongs to the open file, so that it ends with the process however that ends. The
    file itself stays: removing it would let two runs lock two files of one name.

    Returns:
        The handle; `os.close` gives the lock back.

    Raises:
        OutputError: another run holds it.
        OSError: the file cannot be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OutputError(
            f"another run is writing to {path.parent}",
            "wait for it, stop it, or take another folder",
        ) from None
    except OSError:  # a file system without locks
        pass
    return handle


@contextlib.contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Keep every other run that writes to ``folder`` out of it for the length of the block.

    Raises:
        OutputError: another run is writing there, or the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock_file(folder / LOCK_FILE)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to: {error.strerror or error}", "choose another folder"
        ) from None
    try:
        yield
    finally:
        os.close(handle)
