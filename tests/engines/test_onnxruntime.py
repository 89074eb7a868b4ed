"""ONNX Runtime's backend: the CPU for real, CUDA with a fake that computes and keeps count."""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from _support.cuda import FakeCuda, OnGpu
from _support.engines import SHAPE, graph, images, pretend_machine, write_engine
from ulae_rt.engines import load_engine
from ulae_rt.engines.backends import onnxruntime as backend_module
from ulae_rt.engines.backends.onnxruntime import OnnxRuntimeBackend
from ulae_rt.engines.machine import Gpu
from ulae_rt.errors import BackendUnavailable, EngineMismatch
from ulae_rt.manifest import ANY_BATCH

CUDA = "CUDAExecutionProvider"
STRICT = ("session.disable_cpu_ep_fallback", "1")
FALLBACK = (
    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to "
    "CPU EP has been explicitly disabled by the user."
)


class FakeRuntime:
    """An onnxruntime-gpu; sessions and values know what was done with them."""

    __version__ = "1.32.0"

    def __init__(self):
        self.sessions = []
        self.on_cpu = []  # op types that it has no CUDA kernel for
        self.graphs_fail = False
        self.out_of_memory = False
        self.values = []
        runtime = self

        class SessionOptions:
            def __init__(self):
                self.entries = []

            def add_session_config_entry(self, key, value):
                self.entries.append((key, value))

        class OrtValue:
            def __init__(self, shape):
                self.array = np.full(shape, np.nan, np.float32)
                self.place = id(self.array)
                runtime.values.append(self)

            @classmethod
            def ortvalue_from_shape_and_type(cls, shape, dtype, device, index):
                assert (dtype, device) == (np.float32, "cuda")
                return cls(shape)

            def data_ptr(self):
                return self.array.ctypes.data

            def update_inplace(self, array):
                assert array.flags.c_contiguous
                self.array[...] = array

            def numpy(self):
                return self.array.copy()

        class InferenceSession:
            def __init__(self, content, options, providers, enable_fallback):
                assert enable_fallback == 0
                if runtime.on_cpu and STRICT in options.entries:
                    raise RuntimeError(FALLBACK)
                ((self.provider, self.settings),) = providers
                self.options, self.runs = options, 0
                self.batch = 1
                runtime.sessions.append(self)

            def get_inputs(self):
                return self.tensors("moving", "fixed")

            def get_outputs(self):
                return self.tensors("moved", "disp")

            def tensors(self, *names):
                first = runtime.batch if runtime.batch > 0 else "batch"
                return [
                    SimpleNamespace(name=n, shape=[first, 3 if n == "disp" else 1, *SHAPE])
                    for n in names
                ]

            def get_provider_graph_assignment_info(self):
                node = lambda kind: SimpleNamespace(op_type=kind)  # noqa: E731
                cuda = SimpleNamespace(ep_name=CUDA, get_nodes=lambda: [node("Conv")])
                cpu = SimpleNamespace(
                    ep_name="CPUExecutionProvider",
                    get_nodes=lambda: [node(kind) for kind in runtime.on_cpu],
                )
                return [cuda, cpu]

            def io_binding(self):
                return Binding()

            def run_with_iobinding(self, binding, options=None):
                self.runs += 1
                runtime.on_run()
                if runtime.out_of_memory:
                    raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")
                if runtime.graphs_fail and "enable_cuda_graph" in self.settings:
                    raise RuntimeError("CUDA failure 900: operation not permitted")
                moving, fixed = (binding.values[name].array for name in ("moving", "fixed"))
                results = {"moved": moving + fixed, "disp": moving - fixed}
                outputs = binding.values.keys() - {"moving", "fixed"}
                assert len(outputs) == 2 or options.only_execute_path_to_fetches
                for name in outputs:
                    binding.values[name].array[...] = results[name]

            def run(self, names, feeds, options):
                self.runs += 1
                assert options.only_execute_path_to_fetches
                difference = feeds["moving"] - feeds["fixed"]
                results = {
                    "moved": feeds["moving"] + feeds["fixed"],
                    "disp": np.repeat(difference, 3, axis=1),
                }
                return [results[name] for name in names]

        class Binding:
            def __init__(self):
                self.values = {}

            def bind_ortvalue_input(self, name, value):
                self.values[name] = value

            def bind_ortvalue_output(self, name, value):
                self.values[name] = value

            def bind_input(self, name, device, index, dtype, shape, address):
                assert (device, index, dtype) == ("cuda", 0, np.float32)
                self.values[name] = SimpleNamespace(array=memory(address, shape))

            bind_output = bind_input

        self.batch = 1
        self.on_run = lambda: None
        self.SessionOptions, self.OrtValue = SessionOptions, OrtValue
        self.InferenceSession, self.RunOptions = InferenceSession, onnxruntime.RunOptions

    def get_available_providers(self):
        return [CUDA, "CPUExecutionProvider"]


def memory(address, shape):
    """The float32 values that lie somewhere."""
    values = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(values).reshape(shape)


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(backend_module, "onnxruntime", lambda: fake)
    return fake


def feeds(batch=1):
    return dict(zip(("moving", "fixed"), images(batch), strict=True))


def assert_right(found, given):
    given = {name: np.asarray(image) for name, image in given.items()}
    np.testing.assert_array_equal(found["moved"], given["moving"] + given["fixed"])
    difference = given["moving"] - given["fixed"]
    np.testing.assert_array_equal(found["disp"], np.repeat(difference, 3, axis=1))


def test_cuda_keeps_to_the_gpu_exactly_and_replays_a_graph(runtime):
    backend = OnnxRuntimeBackend(b"", "cuda:2")
    (session,) = runtime.sessions
    assert backend.device == "cuda:2"
    assert session.provider == CUDA
    assert session.settings == {
        "device_id": "2",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
    }
    assert STRICT in session.options.entries
    assert session.runs == 2  # set up and recorded before the first images come


def test_cuda_results_lie_in_the_same_place_and_belong_to_the_caller(runtime):
    backend = OnnxRuntimeBackend(b"", "cuda")
    places = [value.place for value in runtime.values]
    first, second = feeds(), {name: image[..., ::-1].copy() for name, image in feeds().items()}
    result = backend.run(first)
    assert_right(backend.run(second), second)
    assert_right(result, first)
    assert [value.place for value in runtime.values] == places
    assert len(places) == 4


@pytest.fixture
def torch_cuda(runtime, monkeypatch):
    """torch's side of the GPU: who waits for whom, and reads memory by its address."""
    cuda = FakeCuda(monkeypatch)
    runtime.on_run = lambda: cuda.calls.append("run")

    def as_tensor(there, device):
        interface = there.__cuda_array_interface__
        assert (interface["typestr"], device) == ("<f4", "cuda:0")
        address, read_only = interface["data"]
        assert not read_only
        return torch.from_numpy(memory(address, interface["shape"]))

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return cuda


IN_ORDER = [
    "its own waits for the caller's",
    "synchronize",
    "run",
    "the caller's waits for its own",
]


def test_cuda_tensors_are_copied_to_and_from_the_places_of_the_graph(runtime, torch_cuda):
    backend = OnnxRuntimeBackend(b"", "cuda")
    given = {name: torch.from_numpy(image) for name, image in feeds().items()}
    arrays = feeds()
    torch_cuda.calls.clear()
    first = backend.run(given)
    assert torch_cuda.calls == IN_ORDER
    swapped = {"moving": given["fixed"], "fixed": given["moving"]}
    assert_right(backend.run(swapped), swapped)
    assert_right(first, given)
    assert list(backend.run(given, ["disp"])) == ["disp"]
    assert_right(backend.run(arrays), arrays)
    assert len(runtime.values) == 4


@pytest.mark.parametrize("wanted", [["moved", "disp"], ["disp"]])
def test_cuda_tensors_of_an_open_batch_are_bound_where_they_are(runtime, torch_cuda, wanted):
    runtime.batch = ANY_BATCH
    backend = OnnxRuntimeBackend(b"", "cuda", ANY_BATCH)
    given = {name: torch.from_numpy(image) for name, image in feeds(3).items()}
    first = backend.run(given, wanted)
    assert torch_cuda.calls == IN_ORDER
    backend.run({name: image.flip(2) for name, image in given.items()}, wanted)
    assert list(first) == wanted
    for name in wanted:
        np.testing.assert_array_equal(first[name], backend.run(feeds(3), [name])[name])
    assert not runtime.values


def test_cuda_tensors_that_are_too_many_are_halved(runtime, torch_cuda, tmp_path, monkeypatch):
    pretend_machine(monkeypatch, gpus=(Gpu("NVIDIA T4", 75),))
    monkeypatch.setattr("onnxruntime.get_available_providers", runtime.get_available_providers)
    runtime.batch = ANY_BATCH
    engine = load_engine(write_engine(tmp_path, batch=ANY_BATCH), device="cuda")
    moving, fixed = (torch.from_numpy(image).as_subclass(OnGpu) for image in images(5))
    made = torch.empty

    def small_only(shape, **options):
        if shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return made(shape, **options)

    monkeypatch.setattr(torch, "empty", small_only)
    out = engine.run(moving, fixed)
    assert_right(out._asdict(), {"moving": moving, "fixed": fixed})
    assert engine.at_once == 2


def test_real_runtime_binds_memory_by_its_address():
    """As the CUDA provider does; with the calls and in the order of this version."""
    backend = OnnxRuntimeBackend(graph(ANY_BATCH), "cpu", ANY_BATCH)
    given, out = feeds(3), np.empty((3, 1, *SHAPE), np.float32)
    binding = backend._session.io_binding()
    for name, image in given.items():
        binding.bind_input(name, "cpu", 0, np.float32, image.shape, image.ctypes.data)
    binding.bind_output("moved", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    backend._session.run_with_iobinding(binding, backend._options)
    np.testing.assert_array_equal(out, given["moving"] + given["fixed"])
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(SHAPE, np.float32, "cpu", 0)
    memory(value.data_ptr(), SHAPE)[...] = 7
    assert value.numpy().min() == 7


def test_graph_that_cannot_be_recorded_is_said_and_done_without(runtime, caplog):
    runtime.graphs_fail = True
    backend = OnnxRuntimeBackend(b"", "cuda")
    assert "without a CUDA graph on cuda:0, which is slower: failed preparing" in caplog.text
    assert "enable_cuda_graph" not in runtime.sessions[-1].settings
    assert_right(backend.run(feeds()), feeds())


def test_node_on_the_cpu_is_refused(runtime):
    runtime.on_cpu = ["GridSample"]
    with pytest.raises(BackendUnavailable, match="cannot run the whole model on cuda:0") as caught:
        OnnxRuntimeBackend(b"", "cuda")
    assert "1.25 or later" in caught.value.hint
    runtime.batch = ANY_BATCH
    with pytest.raises(BackendUnavailable, match="it puts GridSample on the CPU"):
        OnnxRuntimeBackend(b"", "cuda", ANY_BATCH)


def test_open_batch_may_reckon_its_sizes_on_the_cpu(runtime):
    runtime.on_cpu, runtime.batch = ["Shape", "Gather"], ANY_BATCH
    backend = OnnxRuntimeBackend(b"", "cuda", ANY_BATCH)
    assert "enable_cuda_graph" not in runtime.sessions[0].settings
    assert not runtime.values
    assert_right(backend.run(feeds(3)), feeds(3))


def test_full_gpu_is_one_error_with_a_remedy(runtime):
    backend = OnnxRuntimeBackend(b"", "cuda")
    runtime.out_of_memory = True
    with pytest.raises(EngineMismatch, match="out of memory running the model on cuda:0") as caught:
        backend.run(feeds())
    assert "smaller batch" in caught.value.hint


def test_full_host_is_one_error_with_a_remedy():
    backend = OnnxRuntimeBackend(graph(), "cpu")

    def fail(names, feeds, options):
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    backend._session = SimpleNamespace(run=fail)
    with pytest.raises(EngineMismatch, match="out of memory running the model on cpu"):
        backend.run(feeds())


def test_node_that_fails_is_one_error_and_nothing_else_is_printed(capfd):
    size = helper.make_tensor("size", TensorProto.INT64, (1,), (7,))
    images = [helper.make_tensor_value_info(n, 1, (1, 1, *SHAPE)) for n in ("moving", "fixed")]
    result = helper.make_tensor_value_info("moved", 1, None)
    node = helper.make_node("Reshape", ["moving", "sizes"], ["moved"])
    chosen = helper.make_node("Mul", ["size", "size"], ["sizes"])
    net = helper.make_graph([chosen, node], "net", images, [result], [size])
    model = helper.make_model(net, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    backend = OnnxRuntimeBackend(model.SerializeToString(), "cpu")
    with pytest.raises(
        EngineMismatch, match=r"failed running the model on cpu: .* Reshape"
    ) as caught:
        backend.run(feeds())
    assert caught.value.hint
    assert capfd.readouterr().err == ""


def test_real_runtime_takes_an_open_batch_and_closes():
    backend = OnnxRuntimeBackend(graph(ANY_BATCH), "cpu", ANY_BATCH)
    assert backend.inputs["fixed"] == (ANY_BATCH, 1, *SHAPE)
    assert_right(backend.run(feeds(3)), feeds(3))
    backend.close()
    backend.close()


def test_real_runtime_refuses_to_leave_the_gpu(capfd):
    """The words by which the backend knows the refusal are this version's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*STRICT)
    with pytest.raises(Exception, match="assigned to the default CPU EP"):
        onnxruntime.InferenceSession(graph(), options, providers=[], enable_fallback=0)
    assert capfd.readouterr().err == ""


def test_real_runtime_tells_where_nodes_are():
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(graph(), options, providers=["CPUExecutionProvider"])
    parts = session.get_provider_graph_assignment_info()
    kinds = {node.op_type for part in parts for node in part.get_nodes()}
    assert {part.ep_name for part in parts} == {"CPUExecutionProvider"}
    assert {"Add", "Sub"} <= kinds


def test_auto_takes_the_cpu_where_the_gpu_fails_and_says_so(runtime, monkeypatch, tmp_path, caplog):
    pretend_machine(monkeypatch, gpus=(Gpu("NVIDIA T4", 75),))
    monkeypatch.setattr("onnxruntime.get_available_providers", runtime.get_available_providers)
    write_engine(tmp_path)

    def session(content, options, providers, enable_fallback):
        if providers == ["CPUExecutionProvider"]:
            return onnxruntime.InferenceSession(content, providers=providers)
        raise RuntimeError(FALLBACK)

    runtime.InferenceSession = session
    engine = load_engine(tmp_path)
    assert engine.device == "cpu"
    assert "cannot run the whole model on cuda:0" in caplog.text
    with pytest.raises(BackendUnavailable, match="cannot run the whole model on cuda:0"):
        load_engine(tmp_path, device="cuda")


# Hints, followed


@pytest.fixture
def gpu(runtime, monkeypatch, tmp_path):
    """A folder of an engine, on a machine with a GPU; on the CPU it is run for real."""
    pretend_machine(monkeypatch, gpus=(Gpu("NVIDIA T4", 75),))
    monkeypatch.setattr("onnxruntime.get_available_providers", runtime.get_available_providers)
    on_gpu = runtime.InferenceSession

    def session(content, options, providers, enable_fallback):
        if providers == ["CPUExecutionProvider"]:
            return onnxruntime.InferenceSession(content, providers=providers)
        return on_gpu(content, options, providers, enable_fallback)

    monkeypatch.setattr(runtime, "InferenceSession", session)
    return write_engine(tmp_path)


@pytest.mark.follows("close other programs, give fewer pairs at once, or take an engine of fp16")
@pytest.mark.parametrize("remedy", ["others", "fp16", "smaller", "cpu"])
def test_hint_for_a_full_gpu(gpu, runtime, remedy):
    """Of which 2 pairs of fp32 are too many, and one or 2 of fp16 are not."""
    write_engine(gpu, "ulae-net-fp32-b2", batch=2)
    write_engine(gpu, "ulae-net-fp16-b2", batch=2, precision="fp16")
    name, runtime.batch = "ulae-net-fp32-b2", 2
    engine = load_engine(gpu / f"{name}.onnx", device="cuda")
    runtime.out_of_memory = True
    with pytest.raises(EngineMismatch, match="out of memory") as caught:
        engine.run(*images(2))
    assert caught.value.hint.startswith("close other programs, give fewer pairs at once, or take")
    runtime.out_of_memory = False  # for what is tried now
    name, pairs, device = {
        "others": (name, 2, "cuda"),
        "fp16": ("ulae-net-fp16-b2", 2, "cuda"), "smaller": ("ulae-net-fp32", 1, "cuda"),
        "cpu": (name, 2, "cpu"),
    }[remedy]  # fmt: skip
    runtime.batch = 1 if remedy == "smaller" else runtime.batch
    runtime.out_of_memory = remedy == "cpu"  # the GPU still is
    moving, fixed = images(pairs)
    found = load_engine(gpu / f"{name}.onnx", device=device).run(moving, fixed)
    np.testing.assert_array_equal(found.moved, moving + fixed)


@pytest.mark.follows("replace it: pip uninstall onnxruntime, then pip install onnxruntime-gpu")
def test_hint_for_an_onnxruntime_of_the_cpu(gpu, runtime, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(BackendUnavailable, match="runs on the CPU only") as caught:
            load_engine(gpu, device="cuda")
    assert "pip uninstall onnxruntime, then pip install onnxruntime-gpu" in caught.value.hint
    assert load_engine(gpu, device="cuda").device == "cuda:0"  # what that installs


@pytest.mark.follows(
    "install onnxruntime-gpu 1.25 or later with the CUDA and cuDNN it names, or use"
)
def test_hint_for_a_node_that_an_old_onnxruntime_puts_on_the_cpu(gpu, runtime):
    runtime.on_cpu = ["GridSample"]
    with pytest.raises(BackendUnavailable, match="cannot run the whole model") as caught:
        load_engine(gpu, device="cuda")
    assert "install onnxruntime-gpu 1.25 or later" in caught.value.hint
    assert load_engine(gpu, device="cpu").device == "cpu"
    runtime.on_cpu = []  # as 1.25 has it
    assert load_engine(gpu, device="cuda").device == "cuda:0"
