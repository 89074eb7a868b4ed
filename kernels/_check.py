"""What every op asks of its arguments, with messages that say expected and got."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulae_rt.errors import DtypeError, ShapeError, UsageError


def check_volume(op: str, name: str, x: Tensor) -> None:
    """``x`` is a floating (B, C, D, H, W) tensor."""
    if x.ndim != 5:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected (B, C, D, H, W)",
            "add the batch and channel axes",
        )
    if not x.is_floating_point():
        raise DtypeError(
            f"{op}: {name} is {x.dtype}, expected a floating type", f"convert it: {name}.float()"
        )
    if 0 in x.shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(x.shape)}, expected no empty axis")


def check_displacement(
    op: str, name: str, disp: Tensor, like: Tensor | None = None, factor: int = 1
) -> None:
    """``disp`` is a floating (B, 3, D, H, W) tensor, on ``like``'s batch, grid and device.

    Its grid is ``like``'s divided by ``factor``, which must divide it.
    """
    check_volume(op, name, disp)
    shape = like.shape if like is not None else disp.shape
    if any(size % factor for size in shape[2:]):
        raise ShapeError(
            f"{op}: the grid {tuple(shape[2:])} is not a multiple of factor = {factor}",
            "resize the displacement to the full grid first",
        )
    expected = (shape[0], 3, *(size // factor for size in shape[2:]))
    if tuple(disp.shape) != expected:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(disp.shape)}, expected {expected}",
            "a displacement has 3 components and the batch and grid of what it warps",
        )
    if like is not None and disp.device != like.device:
        raise ShapeError(
            f"{op}: {name} is on {disp.device}, expected {like.device}", "move one to the other"
        )


def check_same(op: str, x: Tensor, y: Tensor) -> None:
    """``y`` has ``x``'s shape and device."""
    if x.shape != y.shape:
        raise ShapeError(
            f"{op}: y has shape {tuple(y.shape)}, expected {tuple(x.shape)} as x",
            "crop or resample one of them",
        )
    if x.device != y.device:
        raise ShapeError(f"{op}: y is on {y.device}, expected {x.device} as x", "move one")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{op}: {name} is {value!r}, expected one of {', '.join(choices)}")


def check_window(op: str, window: int) -> None:
    """``window`` is a positive odd integer."""
    if window < 1 or window % 2 == 0:
        raise UsageError(f"{op}: window is {window}, expected a positive odd integer")


def is_whole(value: object) -> bool:
    """Whether it is a whole number, or what torch puts in its place where it traces."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def check_factor(op: str, factor: int) -> None:
    """``factor`` is a positive integer."""
    if not is_whole(factor) or factor < 1:
        raise UsageError(f"{op}: factor is {factor}, expected a positive integer")


def check_sizes(op: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """``shape`` is three positive whole numbers."""
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(map(is_whole, shape)):
        raise ShapeError(
            f"{op}: shape is {shape}, expected three whole numbers (D, H, W)",
            "give the three sizes of the output",
        )
    if min(shape) < 1:
        raise ShapeError(
            f"{op}: shape is {tuple(shape)}, expected (D, H, W), all positive",
            "give the three sizes of the output",
        )
    depth, height, width = shape
    return depth, height, width


def check_matrix(op: str, name: str, matrix: Tensor, columns: int, like: Tensor) -> None:
    """``matrix`` is (B, 3, columns) in float32 or float64, on ``like``'s batch and device."""
    expected = (len(like), 3, columns)
    if tuple(matrix.shape) != expected:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(matrix.shape)}, expected {expected}",
            "give one matrix for each batch entry, without its last row",
        )
    if matrix.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"{op}: {name} is {matrix.dtype}, expected float32 or float64",
            f"convert it: {name}.double()",
        )
    if matrix.device != like.device:
        raise ShapeError(
            f"{op}: {name} is on {matrix.device}, expected {like.device}",
            "move one to the other",
        )


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """No gradient is asked of an operation that has none."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                f"{op}: {name} requires a gradient, and this operation has none",
                "call it under torch.no_grad()",
            )
