"""What every backend offers, and the words for what any of them may be refused."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import EngineMismatch, OutOfMemory

Array = NDArray[np.float32]


class Backend(Protocol):
    """A loaded artefact. One thread at a time; `ulae_rt.engines.session` sees to that.

    Attributes:
        name: one of ``BACKENDS``.
        device: ``cpu`` or ``cuda:N``.
        inputs, outputs: name to shape, in the artefact's order; a batch that is left open is
            `ulae_rt.manifest.ANY_BATCH`.
    """

    name: str
    device: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Execute once.

        Args:
            feeds: name to contiguous float32 array of the artefact's own shape; on a GPU also to
                torch tensors there, all of them, which the current stream computes.
            outputs: names of those that are wanted, None for all; the others are neither copied
                nor, where the library can leave them out, computed.

        Returns:
            Name to array, or of tensors to tensor, which the backend does not touch again. Tensors
            are there for what the current stream is given later; the host need not have waited.

        Raises:
            EngineMismatch: if the library fails; OutOfMemory: if memory does not suffice; see
                `failure`.
        """
        ...

    def close(self) -> None:
        """Free what it holds; it does not run again. A second time does nothing."""
        ...


def failure(what: str, error: object) -> EngineMismatch:
    """The error for a library that failed: `OutOfMemory`, or something only its own words tell.

    Args:
        what: was being done, e.g. ``"running net.onnx on cuda:0"``.
        error: the exception, or what the library logged.
    """
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in said.lower() for words in _OUT_OF_MEMORY):
        return OutOfMemory(
            f"out of memory {what}" + (f": {said}" if said else ""),
            "close other programs, give fewer pairs at once, or take an engine of fp16 or of a "
            "smaller batch; --device cpu where the GPU is full",
        )
    return EngineMismatch(
        f"failed {what}: {said or type(error).__name__}",
        "`ulae-rt doctor` says what can run; an engine needs the versions it was exported with",
    )


# How the libraries say it. No type of theirs does.
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "out-of-memory",
    "bad_alloc",
    "failed to allocate",
    "can't allocate",
    "cannot allocate",
    "memoryallocation",
)
