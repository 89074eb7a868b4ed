"""Kernels compiled beforehand that came with the files: Triton's cache, wherever it now lies.

`cubins` fills the folder on a machine without a GPU, with the Triton of the one that has it.
Triton takes a compiled kernel for its own when the hash of its sources, of the kernel and of the
options is the same; then nothing is compiled. Where it is not, everything is, and nothing fails.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from harness.files import write_whole
from harness.record import ROOT

CACHE = ROOT / "build" / "triton-cache"
KEY = "key.json"
_GROUP = "__grp__"


def use(cache: Path) -> int:
    """Let Triton, in the processes that this one starts, find its kernels in ``cache``.

    Returns:
        how many are there.
    """
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    groups = list(cache.glob(f"*/{_GROUP}*.json"))
    for group in groups:
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):  # damaged
            _mend(group)
    return len(groups)


def _mend(group: Path) -> None:
    """Name a kernel's files where they lie now: Triton keeps their absolute paths."""
    content = json.loads(group.read_text(encoding="utf-8"))
    places = {name: str(group.parent.resolve() / name) for name in content["child_paths"]}
    if places != content["child_paths"]:
        write_whole(group, json.dumps({**content, "child_paths": places}))


def folders(cache: Path) -> set[str]:
    """One for each kernel and each launcher that is there."""
    return {path.name for path in cache.iterdir() if path.is_dir()} if cache.is_dir() else set()


def key(arch: int) -> dict[str, Any]:
    """What decides, beside a kernel and its options, whether a compiled one is taken."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        # The version, and the hash of each of Triton's own files that matter.
        "triton_key": triton_key(),
        "ptxas": get_ptxas_version(arch),
        "arch": arch,
    }


def compared(cache: Path, arch: int) -> dict[str, Any]:
    """Whether the carried kernels are of use here: ``same``, or which parts of the key differ."""
    try:
        carried = json.loads((cache / KEY).read_text(encoding="utf-8"))
        here = key(arch)
        differ = [name for name, value in here.items() if carried.get(name) != value]
    except (AttributeError, ImportError, OSError, ValueError) as error:
        # Without the path that an OSError has in its words: this is committed.
        words = error.strerror if isinstance(error, OSError) else error
        return {"same": False, "why": f"{type(error).__name__}: {words}"}
    return {"same": not differ, "differ": differ, "carried": carried, "here": here}
