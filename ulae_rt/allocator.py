"""How the process asks the system for memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next tensor.

    By default every tensor above 32 MB is mapped and unmapped anew, and the kernel clears its
    pages each time: half the time of the elementwise operations on a volume (LeakyReLU of
    16 x 80x96x80 fp32: 14 ms, with this 2 ms). Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
