"""TensorRT's backend without a GPU: what it asks of CUDA and of the library, and in which order.

The fakes compute what `_support.engines.graph` does, on the memory they were given and only when
the stream is waited for: a copy or a wait that is missing or misplaced gives wrong numbers.
"""

import ctypes
import enum
import gc
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from _support.cuda import FakeCuda as FakeTorchCuda
from _support.engines import SHAPE, images, pretend_machine, write_engine
from ulae_rt.cli import run_command
from ulae_rt.engines import Engine, load_engine
from ulae_rt.engines.backends import cuda as cuda_module
from ulae_rt.engines.backends import tensorrt as tensorrt_module
from ulae_rt.engines.backends.tensorrt import TensorRtBackend
from ulae_rt.engines.machine import Gpu
from ulae_rt.errors import BackendUnavailable, EngineMismatch

KINDS = ("tensorrt", "tensorrt-rtx")
TENSORS = {"moving": 1, "fixed": 1, "moved": 1, "disp": 3}  # and their channels


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700


class FakeCuda:
    """``cuda.bindings.runtime``: device memory is host memory, streams are lists of work."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        self.calls = []
        self.fails = {}  # function -> (after how many calls, error)
        self.memory = {}
        self.alive = set()  # streams and graphs
        self.work = []
        self.capturing = None
        self.devices = 1

    def __getattribute__(self, name):
        if not name.startswith("cuda") or not callable(getattr(type(self), name, None)):
            return object.__getattribute__(self, name)
        if name.startswith("cudaGetError"):
            return object.__getattribute__(self, name)

        def call(*arguments):
            self.calls.append(name)
            after, error = self.fails.get(name, (0, None))
            if error is not None and self.calls.count(name) > after:
                return (error, None)
            result = object.__getattribute__(self, name)(*arguments)
            return (Error.cudaSuccess,) if result is None else (Error.cudaSuccess, result)

        return call

    def cudaGetErrorName(self, error):
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error):
        return Error.cudaSuccess, error.name.removeprefix("cudaError").lower().encode()

    def cudaGetDeviceCount(self):
        return self.devices

    def cudaSetDevice(self, index):
        assert index < self.devices

    def _allocate(self, size):
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaMallocHost(self, size):
        return self._allocate(size)

    def cudaFree(self, address):
        del self.memory[address]

    def cudaFreeHost(self, address):
        del self.memory[address]

    def _make(self, name):
        self.alive.add(name)
        return name

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        return self._make(7)

    def cudaStreamDestroy(self, stream):
        self.alive.remove(stream)

    def do(self, stream, work):
        assert stream in self.alive
        (self.work if self.capturing is None else self.capturing).append(work)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:  # to or from what torch has
            assert len({to, source} & set(self.memory)) == 1
        else:
            assert {to, source} <= set(self.memory)
        assert self.capturing is None
        self.do(stream, lambda: ctypes.memmove(to, source, size))

    def cudaStreamSynchronize(self, stream):
        while self.work:
            self.work.pop(0)()

    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.work  # nothing half-done goes into a graph
        self.capturing = []

    def cudaStreamEndCapture(self, stream):
        self.recorded, self.capturing = self.capturing, None
        return self._make("graph")

    def cudaGraphInstantiate(self, graph, flags):
        assert graph in self.alive
        return self._make("launchable")

    def cudaGraphDestroy(self, graph):
        self.alive.remove(graph)

    def cudaGraphExecDestroy(self, launchable):
        self.alive.remove(launchable)

    def cudaGraphLaunch(self, launchable, stream):
        assert launchable in self.alive
        for work in self.recorded:
            self.do(stream, work)


class FakeLibrary:
    """``tensorrt`` and ``tensorrt_rtx``: one plan, ``b"a plan"``, that is a small network."""

    __name__ = "tensorrt"
    __version__ = "9.9"
    DataType = enum.Enum("DataType", "FLOAT HALF")
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def __init__(self):
            pass

    def __init__(self, cuda):
        self.cuda = cuda
        self.dtype = self.DataType.FLOAT
        self.shape = SHAPE
        self.enqueued = 0
        self.enqueue_fails_from = 100
        self.graph_strategy = None
        self.refuses = ""

    def Runtime(self, logger):
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self.deserialize)

    def deserialize(self, content):
        self.logger.log(self.ILogger.WARNING, "only a warning")
        if content != b"a plan":
            self.logger.log(self.ILogger.ERROR, "magicTag mismatch")
            return None
        names = list(TENSORS)
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_shape=lambda name: (1, TENSORS[name], *self.shape),
            get_tensor_dtype=lambda name: self.dtype,
            get_tensor_mode=lambda name: (
                self.TensorIOMode.INPUT if name in ("moving", "fixed") else self.TensorIOMode.OUTPUT
            ),
            create_runtime_config=SimpleNamespace,
            create_execution_context=self.context,
        )

    def context(self, config=None):
        self.graph_strategy = config and config.cuda_graph_strategy
        if self.refuses == "context":
            self.logger.log(self.ILogger.ERROR, "insufficient workspace")
            return None
        self.addresses = {}
        return SimpleNamespace(
            set_tensor_address=self.set_tensor_address, execute_async_v3=self.execute
        )

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.refuses != name

    def execute(self, stream):
        self.enqueued += 1
        if self.enqueued >= self.enqueue_fails_from:
            self.logger.log(self.ILogger.ERROR, "an illegal memory access")
            return False
        arrays = {
            name: np.ctypeslib.as_array(
                (ctypes.c_float * int(np.prod((channels, *SHAPE)))).from_address(
                    self.addresses[name]
                )
            ).reshape(channels, *SHAPE)
            for name, channels in TENSORS.items()
        }

        def compute():
            arrays["moved"][...] = arrays["moving"] + arrays["fixed"]
            arrays["disp"][...] = arrays["moving"] - arrays["fixed"]

        self.cuda.do(stream, compute)
        return True


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_module, "require", lambda module, extra: fake)
    return fake


@pytest.fixture
def library(cuda, monkeypatch):
    fake = FakeLibrary(cuda)
    for module in (tensorrt_module, "ulae_rt.engines.machine"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.require", lambda module, extra: fake)
    return fake


def feeds():
    return dict(zip(("moving", "fixed"), images(), strict=True))


def assert_right(found, given):
    given = {name: np.asarray(image) for name, image in given.items()}
    np.testing.assert_array_equal(found["moved"], given["moving"] + given["fixed"])
    difference = given["moving"] - given["fixed"]
    np.testing.assert_array_equal(found["disp"], np.repeat(difference, 3, axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_give_the_numbers_of_their_own_images(cuda, library, kind):
    backend = TensorRtBackend(b"a plan", kind, "cuda:0")
    assert (backend.name, backend.device) == (kind, "cuda:0")
    assert backend.inputs == {"moving": (1, 1, *SHAPE), "fixed": (1, 1, *SHAPE)}
    taken = len(cuda.memory)
    first, second = feeds(), {name: image[..., ::-1] for name, image in feeds().items()}
    result = backend.run(first)
    assert_right(backend.run(second), second)
    assert_right(result, first)  # the second run did not write over what the first gave
    assert len(cuda.memory) == taken == 8  # a host and a device buffer for each tensor


@pytest.mark.parametrize("kind", KINDS)
def test_copies_run_and_copies_in_this_order(cuda, library, kind):
    backend = TensorRtBackend(b"a plan", kind, "cuda")
    cuda.calls.clear()
    enqueued = library.enqueued
    backend.run(feeds())
    launch = ["cudaGraphLaunch"] if kind == "tensorrt" else []
    copies = ["cudaMemcpyAsync"] * 2
    assert cuda.calls == ["cudaSetDevice", *copies, *launch, *copies, "cudaStreamSynchronize"]
    assert library.enqueued - enqueued == (kind == "tensorrt-rtx")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_copied_on_the_gpu_between_what_the_caller_has_it_do(
    cuda, library, kind, monkeypatch
):
    backend = TensorRtBackend(b"a plan", kind, "cuda")
    torch_cuda = FakeTorchCuda(monkeypatch)
    torch_cuda.flush = lambda: cuda.cudaStreamSynchronize(7)  # what waits for it sees it done
    given = {name: torch.from_numpy(image) for name, image in feeds().items()}
    cuda.calls.clear()
    first = backend.run(given)
    launch = ["cudaGraphLaunch"] if kind == "tensorrt" else []
    copies = ["cudaMemcpyAsync"] * 2
    assert cuda.calls[:-1] == [*copies, *launch, *copies]  # the host waits for nothing
    assert torch_cuda.calls == [
        "its own at 7 waits for the caller's",
        "the caller's waits for its own at 7",
    ]
    swapped = {"moving": given["fixed"], "fixed": given["moving"]}
    assert_right(backend.run(swapped), swapped)
    assert_right(first, given)
    assert list(backend.run(given, ["disp"])) == ["disp"]
    assert_right(backend.run(feeds()), feeds())  # arrays and tensors, in turn


def test_graph_is_recorded_once_and_by_the_library_itself_on_rtx(cuda, library):
    TensorRtBackend(b"a plan", "tensorrt", "cuda")
    assert library.enqueued == 2  # the first sets up, the second is recorded
    assert cuda.calls.count("cudaGraphInstantiate") == 1
    assert library.graph_strategy is None
    cuda.calls.clear()
    TensorRtBackend(b"a plan", "tensorrt-rtx", "cuda")
    assert "cudaStreamBeginCapture" not in cuda.calls
    assert library.graph_strategy is library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


@pytest.mark.parametrize("kind", KINDS)
def test_closing_frees_everything_once(cuda, library, kind):
    backend = TensorRtBackend(b"a plan", kind, "cuda")
    assert cuda.memory
    assert cuda.alive
    backend.close()
    backend.close()
    assert (cuda.memory, cuda.alive) == ({}, set())


def test_forgetting_frees_everything(cuda, library):
    TensorRtBackend(b"a plan", "tensorrt", "cuda")
    gc.collect()
    assert (cuda.memory, cuda.alive) == ({}, set())


@pytest.mark.parametrize(
    ("function", "after", "message"),
    [
        ("cudaMalloc", 0, "out of memory in cudaMalloc: cudaErrorMemoryAllocation"),
        ("cudaMalloc", 3, "out of memory in cudaMalloc: cudaErrorMemoryAllocation"),
        ("cudaMallocHost", 2, "out of memory in cudaMallocHost"),
        ("cudaStreamCreateWithFlags", 0, "out of memory in cudaStreamCreate"),
        ("cudaMemcpyAsync", 1, "out of memory in cudaMemcpyAsync"),
    ],
)
def test_no_memory_is_one_error_and_leaves_nothing(cuda, library, function, after, message):
    cuda.fails[function] = after, Error.cudaErrorMemoryAllocation
    with pytest.raises(EngineMismatch, match=message) as caught:
        TensorRtBackend(b"a plan", "tensorrt", "cuda")
    assert "smaller batch" in caught.value.hint
    assert (cuda.memory, cuda.alive) == ({}, set())


def test_failure_while_running_is_one_error(cuda, library):
    backend = TensorRtBackend(b"a plan", "tensorrt", "cuda")
    cuda.fails["cudaStreamSynchronize"] = 0, Error.cudaErrorIllegalAddress
    with pytest.raises(EngineMismatch, match="cudaStreamSynchronize: cudaErrorIllegalAddress"):
        backend.run(feeds())


def test_enqueue_that_fails_gives_the_librarys_reason(cuda, library):
    backend = TensorRtBackend(b"a plan", "tensorrt-rtx", "cuda")
    library.enqueue_fails_from = 0
    with pytest.raises(EngineMismatch, match="running the engine on cuda:0: an illegal memory"):
        backend.run(feeds())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("context", "failed preparing the engine on cuda:0: insufficient workspace"),
        ("disp", "failed giving disp its place on cuda:0: no reason was logged"),
    ],
)
def test_what_the_library_refuses_is_one_error_and_leaves_nothing(cuda, library, what, message):
    library.refuses = what
    with pytest.raises(EngineMismatch, match=message):
        TensorRtBackend(b"a plan", "tensorrt", "cuda")
    assert (cuda.memory, cuda.alive) == ({}, set())


@pytest.mark.parametrize("where", ["enqueue", "cudaGraphInstantiate"])
def test_without_a_graph_it_runs_and_says_so(cuda, library, caplog, where):
    if where == "enqueue":
        library.enqueue_fails_from = 2
    else:
        cuda.fails[where] = 0, Error.cudaErrorIllegalAddress
    backend = TensorRtBackend(b"a plan", "tensorrt", "cuda")
    assert "without a CUDA graph on cuda:0, which is slower" in caplog.text
    assert cuda.capturing is None
    library.enqueue_fails_from = 100
    given = feeds()
    assert_right(backend.run(given), given)
    backend.close()
    assert (cuda.memory, cuda.alive) == ({}, set())


def test_plan_that_is_none_is_refused_with_the_librarys_reason(cuda, library):
    with pytest.raises(EngineMismatch, match=r"with tensorrt 9\.9 on cuda:0: magicTag mismatch"):
        TensorRtBackend(b"another", "tensorrt", "cuda")


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", FakeLibrary.DataType.HALF), ("shape", (-1, 6, 5))]
)
def test_tensors_of_other_types_and_sizes_are_refused(cuda, library, field, value):
    setattr(library, field, value)
    with pytest.raises(EngineMismatch, match=r"moving is .* expected float32 of fixed sizes"):
        TensorRtBackend(b"a plan", "tensorrt", "cuda")
    assert not cuda.memory


def test_no_driver_and_no_such_gpu_are_unavailable(cuda, library):
    with pytest.raises(BackendUnavailable, match="cuda:1 was asked for, and there are 1 GPUs"):
        TensorRtBackend(b"a plan", "tensorrt", "cuda:1")
    cuda.fails["cudaGetDeviceCount"] = 0, Error.cudaErrorInsufficientDriver
    with pytest.raises(
        BackendUnavailable, match=r"needs an NVIDIA GPU .* cudaErrorInsufficientDriver"
    ):
        TensorRtBackend(b"a plan", "tensorrt", "cuda")


def test_engine_of_a_folder_runs_and_closes(cuda, library, monkeypatch, tmp_path):
    pretend_machine(monkeypatch, gpus=(Gpu("NVIDIA H200", 90),))
    write_engine(tmp_path, kind="tensorrt", target="sm90", versions={"tensorrt": "9.9"})
    given = feeds()
    with load_engine(tmp_path) as engine:
        assert isinstance(engine, Engine)
        assert engine.description == "tensorrt, cuda:0, fp32 (ulae-net-fp32.engine)"
        assert_right(engine.run(**given)._asdict(), given)
    assert not cuda.memory


def test_real_library_without_a_driver_says_that_there_is_no_gpu():
    pytest.importorskip("tensorrt_rtx")
    runtime = pytest.importorskip("cuda.bindings.runtime")
    error, _ = runtime.cudaGetDeviceCount()
    if not error:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match=r"tensorrt-rtx needs an NVIDIA GPU .* cudaError"):
        TensorRtBackend(b"a plan", "tensorrt-rtx", "cuda")


def test_calls_are_those_the_real_bindings_have():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in vars(FakeCuda):
        if name.startswith("cuda"):
            assert hasattr(runtime, name)
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyHostToDevice")
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToHost")
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToDevice")
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


def test_members_are_those_the_real_library_has():
    library = pytest.importorskip("tensorrt_rtx")
    for path in (
        "DataType.FLOAT", "TensorIOMode.INPUT", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "ILogger.ERROR", "ILogger.INTERNAL_ERROR", "Runtime.deserialize_cuda_engine",
        "ICudaEngine.num_io_tensors", "ICudaEngine.get_tensor_name",
        "ICudaEngine.get_tensor_shape", "ICudaEngine.get_tensor_dtype",
        "ICudaEngine.get_tensor_mode", "ICudaEngine.create_runtime_config",
        "ICudaEngine.create_execution_context", "IRuntimeConfig.cuda_graph_strategy",
        "IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3",
    ):  # fmt: skip
        value = library
        for part in path.split("."):
            value = getattr(value, part)
    said = tensorrt_module.library_logger(library)
    assert library.Runtime(said)
    said.log(library.ILogger.ERROR, "why")
    said.log(library.ILogger.WARNING, "not why")
    assert said.last == "why"


# Hints, followed


@pytest.mark.follows("use an engine for the CPU; `ulae-rt doctor` says what can run")
def test_hint_where_there_is_no_driver(cuda, library, tmp_path, capsys):
    cuda.fails["cudaGetDeviceCount"] = 0, Error.cudaErrorInsufficientDriver
    with pytest.raises(BackendUnavailable, match="needs an NVIDIA GPU") as caught:
        TensorRtBackend(b"a plan", "tensorrt", "cuda")
    assert caught.value.hint == "use an engine for the CPU; `ulae-rt doctor` says what can run"
    assert run_command("doctor", ["--engine", str(write_engine(tmp_path))]) == 0
    assert re.search(r"ok  ulae-net-fp32\.onnx on cpu", capsys.readouterr().out)
    assert load_engine(tmp_path, device="cpu").backend == "onnxruntime"


@pytest.mark.follows("`ulae-rt doctor` lists them")
def test_hint_for_a_gpu_that_is_one_too_many(cuda, library, monkeypatch, capsys):
    with pytest.raises(BackendUnavailable, match="there are 1 GPUs") as caught:
        TensorRtBackend(b"a plan", "tensorrt", "cuda:1")
    assert caught.value.hint == "`ulae-rt doctor` lists them"
    smi = subprocess.CompletedProcess([], 0, "NVIDIA H200, 143771, 9.0, 580.1\n")
    monkeypatch.setattr("ulae_rt.doctor.shutil.which", lambda program: program)
    monkeypatch.setattr("ulae_rt.doctor.subprocess.run", lambda *_, **__: smi)
    assert run_command("doctor", []) == 0
    assert len(re.findall("GPU(?: 0)? +NVIDIA H200", capsys.readouterr().out)) == 1
    assert TensorRtBackend(b"a plan", "tensorrt", "cuda:0").device == "cuda:0"
