"""Putting written files in their places, so that two writers neither mix nor lose anything."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


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
