"""A torch program on a GPU as one CUDA graph, for all backends that run torch there."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ulae_rt.convolutions import exact_convolutions
from ulae_rt.engines.backends.base import Array
from ulae_rt.engines.backends.streams import between_callers_work

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """As every backend runs torch: no gradients, convolutions that are not rounded to TF32."""
    import torch

    with torch.inference_mode(), exact_convolutions():
        yield


class CapturedProgram:
    """A program of fixed sizes: its memory set aside, recorded once, replayed for each run.

    One thread at a time may call it, and of programs that share a pool one at a time.

    Args:
        program: takes one float32 tensor an input, gives a sequence of tensors.
        shapes: of the inputs.
        stream: where it runs, its own and no other's.
        pool: of ``torch.cuda.graph_pool_handle``, which lets programs that never run at the same
            time share the memory of what they compute; None for one of its own.
    """

    def __init__(
        self,
        program: Callable[..., "Sequence[torch.Tensor]"],
        shapes: Sequence[tuple[int, ...]],
        stream: "torch.cuda.Stream",
        pool: Any = None,
    ) -> None:
        import torch

        self._program = program
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.cuda.device(stream.device), inference():
            self._inputs = [torch.zeros(shape, device=stream.device) for shape in shapes]
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                # Loads kernels and tries convolutions, neither of which a graph can.
                self._outputs = list(program(*self._inputs))
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # What other threads ask of CUDA meanwhile is none of the graph's business.
            recording = torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            )
            try:
                with recording:
                    outputs = list(program(*self._inputs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("the program runs without a CUDA graph, slower: %s", error)
            else:
                self._graph, self._outputs = graph, outputs

    def __call__(self, images: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
        """Run once.

        Args:
            images: one an input, of its shape: arrays, or tensors on the stream's device.
            wanted: places of the outputs that are copied out of the program's memory.

        Returns:
            New arrays or tensors, as the images are, in the order of ``wanted``. Of arrays the host
            waits for the end; of tensors the current stream does.
        """
        import torch

        on_host = isinstance(images[0], np.ndarray)
        shapes = [self._outputs[number].shape for number in wanted]
        if on_host:
            # Only pinned memory is copied while the host goes on. torch keeps what is freed of it
            # for the next run; that of the results is given away with the arrays.
            sources = [_pinned(array) for array in images]
            results = [torch.empty(shape, pin_memory=True) for shape in shapes]
        else:
            sources = list(images)
            results = [torch.empty(shape, device=self._stream.device) for shape in shapes]
        order = torch.cuda.stream if on_host else between_callers_work
        with inference(), order(self._stream):
            for place, source in zip(self._inputs, sources, strict=True):
                place.copy_(source, non_blocking=True)
            if self._graph is None:
                self._outputs = list(self._program(*self._inputs))
            else:
                self._graph.replay()
            for result, number in zip(results, wanted, strict=True):
                result.copy_(self._outputs[number], non_blocking=True)
        if not on_host:
            return results
        self._stream.synchronize()
        return [result.numpy() for result in results]


def _pinned(array: Array) -> "torch.Tensor":
    import torch

    # torch warns of arrays that may not be written to.
    writable = torch.from_numpy(np.require(array, requirements="W"))
    return torch.empty(array.shape, pin_memory=True).copy_(writable)
