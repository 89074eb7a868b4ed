"""Files that are there whole or not at all, whatever is killed meanwhile."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, on the disk itself, and put it there in one step.

    What UTF-8 has no bytes for, as in a file's name that is no text, becomes a question mark.
    """
    hidden = path.with_name(f".{path.name}.part")
    with hidden.open("wb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)
