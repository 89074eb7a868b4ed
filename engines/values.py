"""Images and results of an engine: arrays, or torch tensors that lie on the engine's own device.

An engine on the CPU computes on arrays: it reads a caller's tensors as arrays over their memory,
and its results are given back as tensors over theirs. An engine on a GPU is fed a caller's tensors
as they are. torch is imported only by whoever has a tensor, who has imported it.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np

from ulae_rt.engines.backends.base import Array
from ulae_rt.errors import DtypeError

if TYPE_CHECKING:
    import torch

# What one call takes and gives: both images and every result are of the one kind or of the other.
ValuesT = TypeVar("ValuesT", Array, "torch.Tensor")

# How far beyond 0 and 1 an intensity may lie: the rounding of a division or of an interpolation in
# half precision. The network's answer to it is that to the nearest of 0 and 1.
RANGE_SLACK = 1e-3
LOWEST, HIGHEST = np.float32(-RANGE_SLACK), np.float32(1 + RANGE_SLACK)
_ONE = int(np.float32(1).view(np.uint32))
# Bytes that an allocation on a GPU begins at a multiple of, which libraries' kernels count on.
_ALIGNMENT = 256


def is_tensor(values: Any) -> "TypeGuard[torch.Tensor]":
    """Whether these are a torch tensor. Where torch was not imported, nothing is one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def read_images(moving: Any, fixed: Any, device: str) -> dict[str, Any]:
    """The two images as the backend of a device is fed them: nothing is copied.

    Args:
        moving: float32, of any shape: an array, or a torch tensor on ``device``.
        fixed: the same, of the same kind.
        device: ``cpu`` or ``cuda:N``, the engine's.

    Returns:
        ``moving`` and ``fixed``: arrays, or on a GPU the tensors that were given.

    Raises:
        DtypeError: for one array and one tensor, another type or another device.
    """
    images = {"moving": moving, "fixed": fixed}
    tensors = [name for name, image in images.items() if is_tensor(image)]
    if len(tensors) == 1:
        (other,) = images.keys() - tensors
        raise DtypeError(
            f"{tensors[0]} is a torch tensor and {other} is not, expected two tensors or two "
            "arrays",
            f"torch.as_tensor({other}, device='{device}')",
        )
    if tensors:
        return {name: _from_tensor(name, image, device) for name, image in images.items()}
    return {name: _from_array(name, image) for name, image in images.items()}


def _from_tensor(name: str, image: "torch.Tensor", device: str) -> Any:
    import torch

    if str(image.device) != device:
        raise DtypeError(
            f"{name} is on {image.device}, expected it on {device}, where this engine runs",
            f"{name}.to('{device}')",
        )
    if image.layout is not torch.strided:
        raise DtypeError(
            f"{name} is a tensor of {image.layout}, expected a dense one", f"{name}.to_dense()"
        )
    if image.dtype is not torch.float32:
        raise DtypeError(
            f"{name} is {str(image.dtype).removeprefix('torch.')}, expected float32",
            f"{name}.float()",
        )
    if image.requires_grad:
        raise DtypeError(
            f"{name} requires a gradient, expected a tensor that does not: an engine computes none",
            f"{name}.detach()",
        )
    image = image.resolve_neg()  # of whose memory the sign is not applied yet
    return image.numpy() if device == "cpu" else image


def _from_array(name: str, image: Any) -> Array:
    if np.ma.isMaskedArray(image):
        raise DtypeError(
            f"{name} is a masked array, and what is masked would count", f"{name}.filled(0)"
        )
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # what libraries of arrays raise
        raise DtypeError(
            f"{name} cannot be read as an array: {error}",
            "give a float32 array of numpy, or a torch tensor",
        ) from error
    if array.dtype != np.float32:
        raise DtypeError(f"{name} is {array.dtype}, expected float32", f"{name}.astype('float32')")
    return array


def contiguous(values: Any) -> Any:
    """The same values in one piece, copied only if they are not; of a tensor, aligned too."""
    if not is_tensor(values):
        return np.ascontiguousarray(values)
    values = values.contiguous()
    return values if values.data_ptr() % _ALIGNMENT == 0 else values.clone()


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of all parts, pair after pair; of a single part, its own."""
    if len(parts) == 1:
        return dict(parts[0])
    results: dict[str, Any] = {}
    for name, values in parts[0].items():
        of_parts = [part[name] for part in parts]
        if is_tensor(values):
            import torch

            results[name] = torch.cat(of_parts)
        else:
            results[name] = np.concatenate(of_parts)
    return results


def as_tensors(results: Mapping[str, Array]) -> "dict[str, torch.Tensor]":
    """Tensors over the arrays' own memory."""
    import torch

    return {name: torch.from_numpy(values) for name, values in results.items()}


def beyond_range(images: Mapping[str, Any]) -> list[str]:
    """Names of the images that may hold a value outside [0, 1], in one pass over each.

    Of arrays, an image that holds only the rounding that `RANGE_SLACK` allows is named too.
    """
    if is_tensor(images["moving"]):
        return [
            name
            for name, (low, high) in _extremes(images).items()
            if not (low >= LOWEST and high <= HIGHEST)
        ]
    # Read as integers, what is negative, infinite or NaN is above 1.0 too.
    return [name for name, image in images.items() if image.view(np.uint32).max() > _ONE]


def not_finite(results: Mapping[str, Any]) -> list[str]:
    """Names of the results that may hold NaN or infinity, in one pass over each.

    Of arrays, a result with finite values above 1e19 is named too.
    """
    if is_tensor(next(iter(results.values()))):
        return [name for name, ends in _extremes(results).items() if not np.isfinite(ends).all()]
    names = []
    for name, values in results.items():
        flat = np.ravel(values)
        # A sum of squares is NaN or infinite if a value is, and else only for values of 1e19.
        with np.errstate(all="ignore"):
            if not np.isfinite(np.dot(flat, flat)):
                names.append(name)
    return names


def _extremes(tensors: "Mapping[str, torch.Tensor]") -> dict[str, list[float]]:
    """Least and largest value of each, both NaN if one value is; the host waits once for all."""
    import torch

    ends = torch.stack([torch.stack(torch.aminmax(values)) for values in tensors.values()])
    return dict(zip(tensors, ends.tolist(), strict=True))


def on_host(values: Any) -> Array:
    """The values as an array, copied only if they lie on a GPU."""
    array: Array = values.cpu().numpy() if is_tensor(values) else values
    return array


def callers_stream(values: Any) -> AbstractContextManager[Any]:
    """Makes the stream that the caller queues work on here that of the thread that enters it.

    Of values on a GPU; with others it does nothing.
    """
    if not (is_tensor(values) and values.is_cuda):
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.current_stream(values.device))
