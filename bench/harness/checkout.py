"""Which commit is measured."""

import os
import re
import subprocess

from harness.record import ROOT

VARIABLE = "ULAE_RT_COMMIT"
_HASH = re.compile(r"[0-9a-f]{7,40}(-dirty)?")


def commit() -> tuple[str, bool]:
    """Short hash of the checkout, and whether files differ from it.

    Where the files are a copy without their git history, ``ULAE_RT_COMMIT`` says it, as
    ``git describe --always --dirty --abbrev=9 --exclude='*'`` printed it where they came from.

    Raises:
        ValueError: the variable holds something else.
    """
    text = _described() or os.environ.get(VARIABLE) or "unknown"
    if text != "unknown" and not _HASH.fullmatch(text):
        raise ValueError(
            f"{VARIABLE} is {text!r}, expected a commit's hash, with -dirty behind it where files "
            "differ; set it to what git describe --always --dirty --abbrev=9 --exclude='*' prints"
        )
    return text.removesuffix("-dirty"), text.endswith("-dirty")


def _described() -> str:
    """What git says of the checkout; nothing where there is no git, or this is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip()
