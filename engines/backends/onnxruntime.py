"""ONNX Runtime: ``.onnx`` on the CPU, or on one CUDA device."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ulae_rt.arguments import parse_device
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.backends.streams import between_callers_work
from ulae_rt.engines.machine import CUDA_PROVIDER, onnxruntime
from ulae_rt.errors import BackendUnavailable, EngineMismatch
from ulae_rt.manifest import ANY_BATCH

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU or on one CUDA device.

    On the GPU every node runs there or the model is refused; with a static batch the inputs and
    outputs keep their place in its memory, and the whole run is replayed as one CUDA graph.

    Args:
        content: the bytes of an ONNX model.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        batch: the manifest's.

    Raises:
        BackendUnavailable: if ONNX Runtime is not installed or cannot use the device.
        EngineMismatch: if ONNX Runtime cannot load the model.
    """

    name = "onnxruntime"

    def __init__(self, content: bytes, device: str = "cpu", batch: int = 1) -> None:
        kind, self._index = parse_device(device)
        self._binding: Any = None
        # Of tensors: made with the first of them, since arrays need no torch.
        self._stream: torch.cuda.Stream | None = None
        if kind == "cuda":
            self.device = f"cuda:{self._index}"
            self._open_cuda(content, batch)
        else:
            self.device = "cpu"
            options = _options()
            # The arena keeps what it once had and grows in powers of two: 3.3 GB at 160x192x160,
            # against 1.4 GB without it and no time lost (onnxruntime 1.32, CPU).
            options.enable_cpu_mem_arena = False
            options.enable_mem_pattern = False
            self._load(content, options, ["CPUExecutionProvider"])

    def _open_cuda(self, content: bytes, batch: int) -> None:
        runtime = onnxruntime()
        if CUDA_PROVIDER not in runtime.get_available_providers():
            raise BackendUnavailable(
                f"device {self.device} was asked for, and this onnxruntime runs on the CPU only",
                "replace it: pip uninstall onnxruntime, then pip install onnxruntime-gpu",
            )
        options = _options()
        # No TF32, which keeps 10 bits; and no more memory than is asked for.
        settings = {
            "device_id": str(self._index),
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
        if batch == ANY_BATCH:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            self._load(content, options, [(CUDA_PROVIDER, settings)])
            self._check_nodes()
            return
        # The CPU provider is not named, since that would permit what this forbids: a node that
        # runs on the CPU, its inputs and outputs carried back and forth, unsaid.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._load(content, options, [(CUDA_PROVIDER, {**settings, "enable_cuda_graph": "1"})])
            self._bind()
        except EngineMismatch as error:
            logger.warning("without a CUDA graph on %s, which is slower: %s", self.device, error)
            self.close()
            self._load(content, options, [(CUDA_PROVIDER, settings)])
            self._bind()

    def _load(self, content: bytes, options: Any, providers: list[Any]) -> None:
        runtime = onnxruntime()
        # What no wanted output needs is left out.
        self._options = runtime.RunOptions()
        self._options.only_execute_path_to_fetches = True
        try:
            # Without enable_fallback=0 it would print, and take the CPU instead.
            self._session = runtime.InferenceSession(
                content, options, providers=providers, enable_fallback=0
            )
        except Exception as error:  # its exceptions share no base class of their own
            if "assigned to the default CPU EP" in str(error):
                raise _not_on_gpu(
                    self.device, "its CUDA libraries do not load, or it lacks a kernel"
                ) from error
            raise failure(
                f"loading the model with ONNX Runtime {runtime.__version__} on {self.device}", error
            ) from error
        self.inputs = {x.name: _shape(x.shape) for x in self._session.get_inputs()}
        self.outputs = {x.name: _shape(x.shape) for x in self._session.get_outputs()}

    def _check_nodes(self) -> None:
        """With an open batch the sizes are reckoned on the CPU, and nothing else may be there."""
        there = {
            node.op_type
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            if part.ep_name != CUDA_PROVIDER
        }
        if others := sorted(there - _OF_SIZES):
            raise _not_on_gpu(self.device, f"it puts {', '.join(others)} on the CPU")

    def _bind(self) -> None:
        """Give every input and output its place on the GPU, and run once: that records the graph.

        ONNX Runtime's graphs read and write where they were recorded.
        """
        make = onnxruntime().OrtValue.ortvalue_from_shape_and_type
        try:
            places = {
                name: make(shape, np.float32, "cuda", self._index)
                for name, shape in (self.inputs | self.outputs).items()
            }
            binding = self._session.io_binding()
            for name in self.inputs:
                places[name].update_inplace(np.zeros(self.inputs[name], np.float32))
                binding.bind_ortvalue_input(name, places[name])
            for name in self.outputs:
                binding.bind_ortvalue_output(name, places[name])
            for _ in range(2):  # the first allocates, the second is recorded
                self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise failure(f"preparing the model on {self.device}", error) from error
        self._binding, self._places = binding, places

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Execute once; see :meth:`Backend.run`."""
        names = list(self.outputs if outputs is None else outputs)
        try:
            if not isinstance(feeds["moving"], np.ndarray):
                return self._run_tensors(feeds, names)
            if self._binding is None:
                results = self._session.run(names, dict(feeds), self._options)
                return dict(zip(names, results, strict=True))
            for name, image in feeds.items():
                self._places[name].update_inplace(image)
            self._session.run_with_iobinding(self._binding)
            return {name: self._places[name].numpy() for name in names}
        except Exception as error:  # as above
            raise failure(f"running the model on {self.device}", error) from error

    def _run_tensors(
        self, feeds: "Mapping[str, torch.Tensor]", names: Sequence[str]
    ) -> "dict[str, torch.Tensor]":
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        batch = len(feeds["moving"])
        results = {
            name: torch.empty((batch, *self.outputs[name][1:]), device=self.device)
            for name in names
        }
        with between_callers_work(self._stream):
            if self._binding is None:
                binding = self._session.io_binding()
                for bind, tensors in (
                    (binding.bind_input, feeds),
                    (binding.bind_output, results),
                ):
                    for name, tensor in tensors.items():
                        shape = tuple(tensor.shape)
                        bind(name, "cuda", self._index, np.float32, shape, tensor.data_ptr())
                self._run_bound(binding, self._options)
            else:
                for name, image in feeds.items():
                    self._tensor_of(name).copy_(image)
                self._run_bound(self._binding)
                for name, result in results.items():
                    result.copy_(self._tensor_of(name))
        return results

    def _run_bound(self, binding: Any, *options: Any) -> None:
        """Once what was queued for the binding's memory is done.

        ONNX Runtime runs on a stream of its own, for whose end it waits, and orders it with no
        other.
        """
        assert self._stream is not None
        self._stream.synchronize()
        self._session.run_with_iobinding(binding, *options)

    def _tensor_of(self, name: str) -> "torch.Tensor":
        """A tensor over the place of an input or output."""
        import torch

        shape = (self.inputs | self.outputs)[name]
        memory = _Memory(self._places[name].data_ptr(), shape)
        return torch.as_tensor(memory, device=self.device)

    def close(self) -> None:
        """Free the model."""
        self._binding = self._session = None
        self._places = {}


class _Memory:
    """Memory of a GPU, float32, as torch reads it without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (address, False),
            "version": 2,
        }


# What sizes are reckoned with.
_OF_SIZES = frozenset(
    {
        "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Gather", "Mul",
        "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip


def _not_on_gpu(device: str, why: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"ONNX Runtime {onnxruntime().__version__} cannot run the whole model on {device}: {why}",
        "install onnxruntime-gpu 1.25 or later with the CUDA and cuDNN it names, or use "
        "--device cpu",
    )


def _options() -> Any:
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised, and need not be printed too
    return options


def _shape(sizes: list[int | str | None]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else ANY_BATCH for size in sizes)
