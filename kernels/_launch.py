"""Which implementation runs, and what every Triton launch shares.

The public functions ask :func:`uses_triton`; the registered operators ``torch.ops.ulae_rt.*`` are
the Triton kernels themselves. Nothing here imports triton: a machine without it runs the
references.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulae_rt import env
from ulae_rt.errors import BackendUnavailable

logger = logging.getLogger(__name__)

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_said: set[str] = set()
_tracing_for_cpu: ContextVar[bool] = ContextVar("tracing_for_cpu", default=False)


class Missing(NamedTuple):
    """Why the Triton kernels cannot run, and what to do."""

    message: str
    hint: str


def unavailable(device: torch.device) -> Missing | None:
    """Why the Triton kernels cannot run on ``device``; None when they can."""
    if not TRITON_INSTALLED:
        return Missing("triton is not installed", "pip install 'ulae-rt[gpu]'")
    if device.type != "cuda" and not env.triton_interprets():
        return Missing(
            f"they need a CUDA tensor, got one on {device.type}",
            "move it to a GPU, or set TRITON_INTERPRET=1 to run them, slowly, on the CPU",
        )
    return None


def uses_triton(tensor: Tensor) -> bool:
    """Whether an op on ``tensor`` runs its Triton kernel: the device decides, or the environment.

    Raises:
        BackendUnavailable: when ``ULAE_RT_KERNELS=triton`` cannot be honoured.
    """
    choice = env.kernels()
    if choice == "reference":
        return False
    if choice == "triton":
        check_available(tensor)
        return True
    reason = unavailable(tensor.device)
    if reason and tensor.device.type == "cuda" and reason.message not in _said:
        _said.add(reason.message)
        logger.info("%s: CUDA tensors take the reference operations (%s)", *reason)
    return reason is None


def check_available(tensor: Tensor) -> None:
    """Refuse, with the reason, a tensor that no Triton kernel can take."""
    if (reason := unavailable(tensor.device)) is not None:
        message = f"the Triton kernels cannot run: {reason.message}"
        raise BackendUnavailable(message, reason.hint)


def arranged_for_cpu(*tensors: Tensor) -> bool:
    """Whether a reference may take its arrangement for torch's CPU operators.

    It writes in place, so no gradient may be asked for; and a graph that is traced for another
    compiler or runtime keeps the plain operations, which those know.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return traces_for_cpu() or not torch.compiler.is_compiling()


def differentiates_on_cpu(*tensors: Tensor) -> bool:
    """Whether a reference may take an autograd function arranged for torch's CPU operators.

    It has a first derivative only, and would hide its operations from whatever traces them.
    """
    here = all(tensor.device.type == "cpu" for tensor in tensors)
    return here and not torch.compiler.is_compiling()


def traces_for_cpu() -> bool:
    """Whether :func:`tracing_for_cpu` is in force."""
    return _tracing_for_cpu.get()


@contextmanager
def tracing_for_cpu() -> Iterator[None]:
    """What is traced inside will be run by torch's CPU operators themselves."""
    token = _tracing_for_cpu.set(True)
    try:
        yield
    finally:
        _tracing_for_cpu.reset(token)


def architecture(tensor: Tensor) -> int:
    """90 for compute capability 9.0; 0 for Triton's interpreter."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def multiprocessors(tensor: Tensor) -> int:
    """Those of its GPU; 1 for Triton's interpreter."""
    if tensor.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def allocate(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Contiguous, uninitialised memory on ``like``'s device, which the kernel writes in full.

    The only place that launchers take memory from: the tests fill it with NaN.
    """
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one: a registered operator cannot return None."""
    return like.new_empty(0) if tensor is None else tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What a kernel computes in: float64 when an input is, float32 otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def wide_index(voxels: int) -> bool:
    """Whether offsets within one volume need 64 bits (between volumes they always have them).

    Half of 2^31, so that an offset and a neighbour's distance can be added without overflow.
    """
    return voxels >= 2**30


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a floating type, for a kernel's ``constexpr``."""
    import triton.language as tl

    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]


def compute_type(*tensors: Tensor) -> Any:
    """:func:`compute_dtype` as Triton's type."""
    return triton_type(compute_dtype(*tensors))
