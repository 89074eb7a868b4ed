"""TensorRT and TensorRT-RTX: ``.engine``, on one GPU. The two libraries share their interface."""

import functools
import logging
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ulae_rt.arguments import parse_device
from ulae_rt.engines.backends.base import Array, failure
from ulae_rt.engines.backends.cuda import Buffer, Cuda
from ulae_rt.engines.backends.streams import between_callers_work
from ulae_rt.engines.machine import TENSORRT_MODULES
from ulae_rt.errors import EngineMismatch
from ulae_rt.manifest import EXPORT_AGAIN_HINT
from ulae_rt.optional import require

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class TensorRtBackend:
    """A plan with its memory, its stream and its CUDA graph, all made once.

    Args:
        content: the bytes of a plan.
        kind: ``tensorrt`` or ``tensorrt-rtx``.
        device: ``cuda`` or ``cuda:N``.

    Raises:
        BackendUnavailable: if the library or a GPU is missing.
        EngineMismatch: if the library refuses the plan, or memory does not suffice.
    """

    def __init__(self, content: bytes, kind: str, device: str = "cuda") -> None:
        self.name = kind
        index = parse_device(device)[1]
        self.device = f"cuda:{index}"
        library = require(TENSORRT_MODULES[kind], kind)
        self._cuda = Cuda(index, kind)
        # Also where nobody closes it: device memory is not Python's to collect.
        self._free = weakref.finalize(self, self._cuda.close)
        self._graph: Any = None
        try:
            self._load(library, content)
            self._prepare(library)
        except BaseException:
            self.close()
            raise

    def _load(self, library: Any, content: bytes) -> None:
        said = library_logger(library)
        self._logger = said
        self._runtime = library.Runtime(said)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            version = getattr(library, "__version__", "")
            raise failure(
                f"loading the engine with {self.name} {version} on {self.device}", said.last
            )
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            shape = tuple(self._engine.get_tensor_shape(name))
            dtype = self._engine.get_tensor_dtype(name)
            if dtype != library.DataType.FLOAT or min(shape) < 1:
                raise EngineMismatch(
                    f"the engine's {name} is {dtype} of {shape}, expected float32 of fixed sizes",
                    EXPORT_AGAIN_HINT,
                )
            is_input = self._engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = shape

    def _prepare(self, library: Any) -> None:
        """Take all the memory and run once: TensorRT sets itself up in the first run."""
        own_graph = self.name == "tensorrt"
        if own_graph:
            self._context = self._engine.create_execution_context()
        else:  # RTX records the graph itself, once its kernels are compiled for this GPU
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._context = self._engine.create_execution_context(config)
        if self._context is None:
            raise failure(f"preparing the engine on {self.device}", self._logger.last)
        self._stream = self._cuda.stream()
        self._buffers = {
            name: Buffer(self._cuda, shape) for name, shape in (self.inputs | self.outputs).items()
        }
        for name, buffer in self._buffers.items():
            if not self._context.set_tensor_address(name, buffer.device):
                raise failure(f"giving {name} its place on {self.device}", self._logger.last)
            buffer.array[...] = 0
        self.run({name: self._buffers[name].array for name in self.inputs})
        if own_graph:
            try:
                self._graph = self._record()
            except EngineMismatch as error:
                logger.warning(
                    "without a CUDA graph on %s, which is slower: %s", self.device, error
                )

    def _record(self) -> Any:
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue()
        finally:  # recording has to end, whatever became of it
            graph = self._cuda.end_capture(self._stream)
        return graph

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise failure(f"running the engine on {self.device}", self._logger.last)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Execute once; see :meth:`Backend.run`."""
        names = list(self.outputs if outputs is None else outputs)
        if isinstance(feeds["moving"], np.ndarray):
            return self._run_arrays(feeds, names)
        return self._run_tensors(feeds, names)

    def _run_arrays(self, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        cuda, stream = self._cuda, self._stream
        cuda.use()
        for name in self.inputs:
            self._buffers[name].array[...] = feeds[name]
            cuda.upload(self._buffers[name], stream)
        self._launch()
        for name in names:
            cuda.download(self._buffers[name], stream)
        cuda.wait(stream)
        return {name: self._buffers[name].array.copy() for name in names}

    def _run_tensors(
        self, feeds: "Mapping[str, torch.Tensor]", names: Sequence[str]
    ) -> "dict[str, torch.Tensor]":
        """Through the buffers, which the recorded graph reads and writes: copies on the GPU.

        Given the tensors' own addresses, it would have to be enqueued launch by launch.
        """
        import torch

        cuda, stream = self._cuda, self._stream
        results = {name: torch.empty(self.outputs[name], device=self.device) for name in names}
        with between_callers_work(torch.cuda.ExternalStream(int(stream), device=self.device)):
            for name in self.inputs:
                buffer = self._buffers[name]
                cuda.copy(buffer.device, feeds[name].data_ptr(), buffer.size, stream)
            self._launch()
            for name, result in results.items():
                buffer = self._buffers[name]
                cuda.copy(result.data_ptr(), buffer.device, buffer.size, stream)
        return results

    def _launch(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda("cudaGraphLaunch", self._graph, self._stream)

    def close(self) -> None:
        """Free the engine and its memory."""
        self._free()
        self._buffers = {}
        self._graph = self._context = self._engine = self._runtime = None


@functools.cache
def library_logger(library: Any) -> Any:
    """The library's log, into Python's: its calls give None or False, and log why.

    One for a process, since TensorRT keeps to the first it is given. ``errors`` has the last few.
    """

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
                return
            level = logging.WARNING if severity == library.ILogger.WARNING else logging.DEBUG
            logger.log(level, "%s: %s", library.__name__, message)

        @property
        def last(self) -> str:
            return self.errors[-1] if self.errors else "no reason was logged"

    return Logger()
