"""The project's registered operators in a traced graph, replaced by launches of their kernels.

AOTInductor would call an operator ``ulae_rt::warp`` back in Python; a Triton kernel that stands in
the graph itself it compiles into the package. So each operator of an inference has a twin here that
torch opens while it compiles.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ulae_rt.kernels.compose import kernel as compose_kernel
from ulae_rt.kernels.norm_activate import kernel as norm_kernel
from ulae_rt.kernels.resize import kernel as resize_kernel
from ulae_rt.kernels.upsample_concat import kernel as upsample_kernel
from ulae_rt.kernels.warp import kernel as warp_kernel
from ulae_rt.kernels.warp_compose import kernel as warp_compose_kernel

_MODULES = (
    compose_kernel, norm_kernel, resize_kernel, upsample_kernel, warp_kernel, warp_compose_kernel,
)  # fmt: skip


@triton_op("ulae_rt_launch::warp", mutates_args={})
def _warp(image: Tensor, disp: Tensor, padding: str, mode: str, factor: int) -> Tensor:
    return warp_kernel.launch_forward(image, disp, padding=padding, mode=mode, factor=factor)


@triton_op("ulae_rt_launch::compose", mutates_args={})
def _compose(disp_a: Tensor, disp_b: Tensor, factor: int) -> Tensor:
    return compose_kernel.launch_forward(disp_a, disp_b, factor=factor)


@triton_op("ulae_rt_launch::warp_compose", mutates_args={})
def _warp_compose(
    image: Tensor, disp_a: Tensor, disp_b: Tensor, factor: int
) -> tuple[Tensor, Tensor]:
    return warp_compose_kernel.launch_forward(image, disp_a, disp_b, factor=factor)


@triton_op("ulae_rt_launch::resize_displacement", mutates_args={})
def _resize_displacement(disp: Tensor, factor: int) -> Tensor:
    return resize_kernel.launch_forward(disp, factor=factor)


@triton_op("ulae_rt_launch::upsample_concat", mutates_args={})
def _upsample_concat(x: Tensor, skip: Tensor, width: int) -> Tensor:
    return upsample_kernel.launch_forward(x, skip, width=width)


@triton_op("ulae_rt_launch::norm_activate", mutates_args={})
def _norm_activate(x: Tensor) -> tuple[Tensor, Tensor]:
    return norm_kernel.launch_forward(x)


def launches(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with every registered operator of an inference in favour of its twin."""
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and name.startswith("ulae_rt."):
            node.target = getattr(torch.ops.ulae_rt_launch, name.split(".")[1]).default
    return program


@contextmanager
def traceable() -> Iterator[None]:
    """Launchers that leave a node in the graph in place of a launch, while torch compiles."""
    with ExitStack() as stack:
        for module in _MODULES:
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel") and hasattr(kernel, "do_not_specialize"):
                    stack.enter_context(patch.object(module, name, wrap_triton(kernel)))
        yield
