"""A torch program on a GPU as one CUDA graph, for all backends that run torch there."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ulae_rt.convolutions import exact_convolutions
from ulae_rt.engines.backends.base import Array

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
            # Only pinned memory is copied while the host goes on.
            self._sent = [torch.empty(shape, pin_memory=True) for shape in shapes]
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

    def __call__(self, arrays: Sequence[Array], wanted: Sequence[int]) -> list[Array]:
        """Run once.

        Args:
            arrays: one an input, of its shape.
            wanted: places of the outputs that are copied to the host.

        Returns:
            New arrays, in the order of ``wanted``.
        """
        import torch

        with inference(), torch.cuda.stream(self._stream):
            for place, sent, array in zip(self._inputs, self._sent, arrays, strict=True):
                # torch warns of arrays that may not be written to.
                sent.copy_(torch.from_numpy(np.require(array, requirements="W")))
                place.copy_(sent, non_blocking=True)
            if self._graph is None:
                self._outputs = list(self._program(*self._inputs))
            else:
                self._graph.replay()
            results = []
            for number in wanted:
                output = self._outputs[number]
                # Given away with the array: torch keeps freed pinned memory for the next run.
                received = torch.empty(output.shape, pin_memory=True)
                results.append(received.copy_(output, non_blocking=True))
        self._stream.synchronize()
        return [received.numpy() for received in results]
