"""Copies between the host and a device: through pinned memory, on streams of their own, counted."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Moved:
    """Bytes that this process has copied so far; nothing is copied where the device is the CPU."""

    to_device: int = 0
    to_host: int = 0


_lock = threading.Lock()
_moved = Moved()
_streams = threading.local()


def moved() -> Moved:
    """What has been copied so far."""
    return _moved


def to_device(array: NDArray[Any], device: str | torch.device) -> Tensor:
    """An array as a tensor on a device, in its own type; on the CPU its very memory if it can be.

    On a GPU the caller's stream waits for the copy, the caller does not.
    """
    place = torch.device(device)
    tensor = torch.from_numpy(np.require(array, requirements="W"))
    if place.type == "cpu":
        return tensor.contiguous()
    _count(to_device=tensor.nbytes)
    stream = _stream(place)
    with torch.cuda.stream(stream):
        copy = tensor.contiguous().pin_memory().to(place, non_blocking=True)
    current = torch.cuda.current_stream(place)
    current.wait_stream(stream)
    copy.record_stream(current)
    return copy


def to_host(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array; on the CPU its very memory, else a copy that has arrived."""
    if tensor.device.type == "cpu":
        return np.asarray(tensor.numpy())
    _count(to_host=tensor.nbytes)
    stream = _stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        # Given away with the array: torch keeps freed pinned memory for the next copy.
        received = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        received.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    stream.synchronize()
    return np.asarray(received.numpy())


def _count(to_device: int = 0, to_host: int = 0) -> None:
    global _moved
    with _lock:
        _moved = Moved(_moved.to_device + to_device, _moved.to_host + to_host)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The calling thread's own for copies."""
    streams: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]
