"""Kernel against reference: the same call on both, forward and every gradient."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from _support.tolerances import report
from _support.volumes import generator

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@contextmanager
def implementation(choice: str) -> Iterator[None]:
    """Run the ops by ``reference`` or ``triton``."""
    before = os.environ.get("ULAE_RT_KERNELS")
    os.environ["ULAE_RT_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["ULAE_RT_KERNELS"]
        else:
            os.environ["ULAE_RT_KERNELS"] = before


@contextmanager
def deterministic() -> Iterator[None]:
    """The same bits every time; the default, whose atomics arrive in any order, on the way out."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(
    op: Op,
    inputs: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
    *,
    choice: str,
    device: torch.device,
) -> list[Tensor]:
    """Outputs and then the gradients of a fixed random functional of them, on the CPU.

    Without gradients where ``needs`` says of every input that it needs none.
    """
    needs = [True] * len(inputs) if needs is None else needs
    leaves = [
        x.detach().to(device).requires_grad_(need) for x, need in zip(inputs, needs, strict=True)
    ]
    with implementation(choice):
        outputs = op(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        if any(needs):
            grads = [
                torch.randn(out.shape, generator=generator(7), dtype=torch.float64).to(out)
                for out in outputs
            ]
            torch.autograd.backward(outputs, grads)
    gradients = [x.grad for x, need in zip(leaves, needs, strict=True) if need]
    return [x.detach().cpu() for x in (*outputs, *gradients) if x is not None]


def assert_kernel_as_good(
    name: str,
    op: Op,
    inputs: Sequence[Tensor],
    device: torch.device,
    needs: Sequence[bool] | None = None,
) -> None:
    """The kernel is at least as close to float64 as the reference in the inputs' types is.

    RMS error at most the reference's, largest error at most twice its largest (of a few thousand
    values, two largest errors of the same size in the mean differ by that). Beside that one
    rounding of the largest value, where the reference happens to be exact and the kernel rounds;
    for float64 inputs, where the reference is the truth, fifty.
    """
    cpu = torch.device("cpu")
    truth = run(op, [x.double() for x in inputs], needs, choice="reference", device=cpu)
    eager = run(op, inputs, needs, choice="reference", device=cpu)
    found = run(op, inputs, needs, choice="triton", device=device)
    assert len(found) == len(truth)
    for index, (actual, plain, expected) in enumerate(zip(found, eager, truth, strict=True)):
        assert actual.dtype == plain.dtype, f"{name}[{index}]: {actual.dtype}"
        kernel = report(f"{name}[{index}] kernel", actual, expected)
        reference = report(f"{name}[{index}] reference", plain, expected)
        print(kernel.line, reference.line, sep="\n")
        rounding = torch.finfo(actual.dtype).eps * float(expected.abs().max())
        if actual.dtype == torch.float64:
            rounding *= 50
        assert kernel.rms <= reference.rms + rounding, f"{kernel.line}; {reference.line}"
        assert kernel.largest <= 2 * reference.largest + rounding, kernel.line
