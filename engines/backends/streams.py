"""In which order a GPU does what a backend and its caller queue on streams of their own."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def between_callers_work(stream: "torch.cuda.Stream") -> Iterator[None]:
    """Makes a backend's stream the current one, and orders it with the caller's by events.

    What is queued meanwhile begins when the caller's work so far is done, and the caller's work to
    come begins after it; the host waits for neither. So a backend reads images that are still being
    computed, and memory that the caller took or takes back on his stream is safe: results are
    allocated before this is entered.

    Args:
        stream: the backend's own. The caller's is the current one of its device.
    """
    import torch

    callers = torch.cuda.current_stream(stream.device)
    stream.wait_stream(callers)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        callers.wait_stream(stream)
