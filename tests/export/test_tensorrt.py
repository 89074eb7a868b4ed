"""Engines are built by the real TensorRT-RTX, for GPUs that are not here, and read back.

TensorRT itself needs a GPU: its part is run with TensorRT-RTX in its place.
"""

import json
import logging
import re
import signal
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorrt_rtx

from _support.nets import small_net
from _support.project import pyproject
from ulae_rt.engines.backends.tensorrt import library_logger
from ulae_rt.engines.machine import TENSORRT_MODULES, Gpu
from ulae_rt.errors import BackendUnavailable, ExportError, UsageError
from ulae_rt.export import tensorrt
from ulae_rt.export.onnx import onnx_from_model
from ulae_rt.export.proof import (
    Convolution,
    census_of_inspection,
    census_of_plan,
    check_precision,
    convolutions_of,
    prove,
)
from ulae_rt.export.tensorrt import build, missing

TINY = (16, 32, 16)
RTX = {"kind": "tensorrt-rtx", "target": "sm89"}


@pytest.fixture(scope="module")
def protos():
    fp16 = onnx_from_model(small_net(), TINY, precision="fp16")
    return {"fp16": fp16, "fp32": widened(fp16)}


@pytest.fixture(scope="module")
def built(protos):
    """An engine for sm89 in either precision, and the progress of its build."""
    engines = {}
    for precision, proto in protos.items():
        told: list[float] = []
        engine = build(proto.SerializeToString(), precision=precision, progress=told.append, **RTX)
        engines[precision] = engine, told
    return engines


@pytest.fixture(scope="module")
def fp16_engine(built):
    return built["fp16"][0]


def copied(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def widened(proto):
    """The same nodes by the same names, in float32: what a library that ignores types builds."""
    wide = copied(proto)
    for tensor in wide.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in wide.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = onnx.TensorProto.FLOAT
    del wide.graph.value_info[:]
    return wide


# Building -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_types_of_an_engine_are_counted(protos, built, precision):
    engine, _ = built[precision]
    convolutions = sum(node.op_type == "Conv" for node in protos[precision].graph.node)
    # The two coarse displacement heads stay in float32.
    wide = convolutions if precision == "fp32" else 2
    assert engine.types.get("convolution float32") == wide
    assert engine.types.get("convolution float16", 0) == convolutions - wide
    assert ("tensor float16" in engine.types) == (precision == "fp16")
    # Under the name that the runtime compares.
    assert engine.versions == {TENSORRT_MODULES["tensorrt-rtx"]: tensorrt_rtx.__version__}
    assert 0 < engine.gigabytes < 1
    assert 0 < engine.device_bytes < 1e9


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm120", "sm121"])
def test_engine_is_built_for_a_gpu_that_is_not_here(protos, target):
    content = protos["fp16"].SerializeToString()
    engine = build(content, kind="tensorrt-rtx", precision="fp16", target=target)
    assert f"accelerators={{{target} }}".encode() in engine.content


def test_half_precision_moves_less(built):
    assert built["fp16"][0].gigabytes < built["fp32"][0].gigabytes


def test_engine_for_all_later_gpus(protos):
    content = protos["fp16"].SerializeToString()
    request = {"kind": "tensorrt-rtx", "precision": "fp16", "target": "sm80"}
    engine = build(content, compatibility="ampere-plus", **request)
    assert b"hardware_forward_compatibility=1" in engine.content
    with pytest.raises(ExportError, match="hardware_forward_compatibility=1, expected 0"):
        census_of_plan(engine.content, "sm80", "none")


@pytest.mark.parametrize("batch", [2, 8])
def test_engine_of_a_batch_moves_as_much_more(protos, fp16_engine, batch):
    # Rewritten, and not traced again, which takes ten times as long as the build.
    proto = copied(protos["fp16"])
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del proto.graph.value_info[:]
    shapes = {node.input[1] for node in proto.graph.node if node.op_type == "Reshape"}
    for tensor in proto.graph.initializer:
        if tensor.name in shapes:
            sizes = onnx.numpy_helper.to_array(tensor).copy()
            sizes[0] = batch
            tensor.CopyFrom(onnx.numpy_helper.from_array(sizes, tensor.name))
    engine = build(proto.SerializeToString(), precision="fp16", **RTX)
    assert 0.6 * batch < engine.gigabytes / fp16_engine.gigabytes < 1.1 * batch
    assert engine.types["convolution float16"] == fp16_engine.types["convolution float16"]


def test_progress_rises_to_the_end(built):
    _, told = built["fp32"]
    assert told == sorted(told)
    assert len(told) > 10
    assert told[-1] == 1.0


@pytest.fixture
def interruptible():
    # What a shell starts in the background, and all that it starts, ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_stops_the_build(protos, capfd):
    told = []

    def interrupt(part):
        told.append(part)
        if part > 0.3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            threading.Event().wait(0.5)  # until the main thread has seen it

    with pytest.raises(KeyboardInterrupt):
        build(protos["fp32"].SerializeToString(), precision="fp32", progress=interrupt, **RTX)
    assert len([part for part in told if part > 0.3]) == 1
    assert capfd.readouterr() == ("", "")


def test_failing_progress_is_raised_here_and_not_in_the_library(protos):
    def fail(part):
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        build(protos["fp32"].SerializeToString(), precision="fp32", progress=fail, **RTX)


def test_library_writes_to_the_log_alone(protos, capfd, caplog, tmp_path):
    with caplog.at_level(logging.DEBUG, "ulae_rt.engines.backends.tensorrt"):
        build(protos["fp32"].SerializeToString(), precision="fp32", timing_cache=tmp_path, **RTX)
    assert capfd.readouterr() == ("", "")
    said = [record for record in caplog.records if record.name.startswith("ulae_rt.")]
    assert any("tensorrt_rtx: " in record.getMessage() for record in said)
    (warning,) = [record for record in said if record.levelno > logging.DEBUG]
    assert "timing cache is not used: TensorRT-RTX times no kernels" in warning.getMessage()
    assert list(tmp_path.iterdir()) == []


# What is missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "compatibility", "message", "hint"),
    [
        ("sm90", "none", "cannot build .* for sm90, expected one of sm80", "kind tensorrt"),
        ("sm75", "none", "cannot build .* for sm75", "ONNX"),
        ("sm89", "same-capability", "no compatibility 'same-capability'", "every GPU of sm89"),
        ("sm89", "ampere-plus", "one for sm80 and later, got target sm89", "target sm80"),
    ],
)
def test_what_tensorrt_rtx_cannot_is_told_before_any_work(target, compatibility, message, hint):
    with pytest.raises(BackendUnavailable, match=message) as caught:
        build(
            b"",
            kind="tensorrt-rtx",
            precision="fp16",
            target=target,
            compatibility=compatibility,
        )
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("plan", "sm89", "none"), "kind is 'plan', expected one of tensorrt, tensorrt-rtx"),
        (("tensorrt-rtx", "ada", "none"), "target is 'ada', expected a GPU architecture"),
        (("tensorrt-rtx", "sm89", "all"), "compatibility is 'all', expected one of none"),
    ],
)
def test_what_does_not_exist_is_wrong_usage(request_, message):
    with pytest.raises(UsageError, match=message):
        missing(*request_)


def test_precision_that_does_not_exist_is_wrong_usage(protos):
    with pytest.raises(UsageError, match="precision is 'int8', expected fp32 or fp16"):
        build(protos["fp32"].SerializeToString(), precision="int8", **RTX)


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
def test_missing_library_is_told(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind.replace("-", "_"), None)
    reason = missing(kind, "sm89")
    assert "is not installed" in reason.message
    assert reason.hint == f"pip install 'ulae-rt[{kind}]'"


def stand_in(name, version):
    """TensorRT-RTX under another name and version."""
    module = ModuleType(name)
    module.__dict__.update(tensorrt_rtx.__dict__, __name__=name, __version__=version)
    return module


@pytest.mark.follows("pip install --upgrade 'ulae-rt[{}]'")
@pytest.mark.parametrize(
    ("kind", "version", "oldest"),
    [
        ("tensorrt", "10.14.1.48", "11.2"),
        ("tensorrt", "11.0.0.114", "11.2"),
        ("tensorrt", "11.1.0.106", "11.2"),
        ("tensorrt-rtx", "1.5.0.114", "1.7"),
    ],
)
def test_library_that_is_too_old_is_told(monkeypatch, kind, version, oldest):
    name = kind.replace("-", "_")
    monkeypatch.setitem(sys.modules, name, stand_in(name, version))
    reason = missing(kind, "sm89")
    assert f"is {version}, expected {oldest} or later" in reason.message
    assert reason.hint == f"pip install --upgrade 'ulae-rt[{kind}]'"
    # What that installs at least.
    extra = pyproject()["project"]["optional-dependencies"][kind]
    (least,) = [re.search(r">=([\d.]+)", each)[1] for each in extra if each.startswith(kind)]
    monkeypatch.setitem(sys.modules, name, stand_in(name, f"{least}.0.1"))
    assert tensorrt._missing_library(kind) is None


@pytest.fixture
def tensorrt_on(monkeypatch):
    """TensorRT 11.4, as far as TensorRT-RTX can stand in for it, on a machine with these GPUs."""

    def install(*architectures):
        monkeypatch.setitem(sys.modules, "tensorrt", stand_in("tensorrt", "11.4.0.106"))
        gpus = tuple(Gpu("a GPU", architecture) for architecture in architectures)
        monkeypatch.setattr(tensorrt, "gpus", lambda: gpus)
        return sys.modules["tensorrt"]

    return install


@pytest.mark.parametrize(
    ("gpus", "target", "compatibility", "message"),
    [
        ((), "sm90", "none", "times kernels on the GPU .* names none here"),
        ((90,), "sm80", "none", "which is sm90, got target sm80"),
        ((75,), "sm75", "ampere-plus", "needs a GPU of sm80 or later, this one is sm75"),
    ],
)
def test_what_tensorrt_lacks_is_told_before_any_work(
    tensorrt_on, gpus, target, compatibility, message
):
    tensorrt_on(*gpus)
    with pytest.raises(BackendUnavailable, match=message):
        build(b"", kind="tensorrt", precision="fp16", target=target, compatibility=compatibility)


def test_target_here_is_the_first_gpu(tensorrt_on):
    tensorrt_on(90, 80)
    assert tensorrt.target_here() == "sm90"
    assert missing("tensorrt", "sm90", "same-capability") is None
    tensorrt_on()
    assert tensorrt.target_here() is None


# What is wrong with the graph ---------------------------------------------------------------------


def set_attribute(proto, name, value):
    """Of one GridSample node."""
    changed = copied(proto)
    node = [node for node in changed.graph.node if node.op_type == "GridSample"][1]
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    return changed


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("mode", "nearest", "NEAREST, FILL, False"),
        ("padding_mode", "border", "LINEAR, CLAMP, False"),
        ("align_corners", 1, "LINEAR, FILL, True"),
    ],
)
def test_other_sampling_than_linear_is_refused(protos, name, value, read):
    changed = set_attribute(protos["fp16"], name, value)
    with pytest.raises(ExportError, match=rf"reads \S+ as \({read}\), expected \(LINEAR"):
        build(changed.SerializeToString(), precision="fp16", **RTX)


def test_sampling_that_the_library_lost_is_refused(protos, monkeypatch):
    counted = copied(protos["fp16"])
    counted.graph.node.append(next(n for n in counted.graph.node if n.op_type == "GridSample"))
    logger = library_logger(tensorrt_rtx)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    assert tensorrt_rtx.OnnxParser(network, logger).parse(protos["fp16"].SerializeToString())
    with pytest.raises(ExportError, match="read 5 GridSample layers, expected 6"):
        tensorrt.check_network(tensorrt_rtx, network, counted)
    counted.graph.output[0].name = "warped"
    with pytest.raises(ExportError, match=r"outputs were read as .*moved.* expected .*warped"):
        tensorrt.check_network(tensorrt_rtx, network, counted)


def test_operator_that_the_library_does_not_know_is_one_line(protos):
    changed = copied(protos["fp32"])
    node = next(node for node in changed.graph.node if node.output[0] == "moved")
    node.op_type, node.domain = "Nothing", "nowhere"
    changed.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    with pytest.raises(ExportError, match=f"cannot read the graph: .*{node.name}") as caught:
        build(changed.SerializeToString(), precision="fp32", **RTX)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_convolution_without_a_size_is_refused(protos):
    changed = copied(protos["fp32"])
    node = next(node for node in changed.graph.node if node.op_type == "LeakyRelu")
    node.op_type, node.domain = "Nothing", "nowhere"
    changed.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    with pytest.raises(ExportError, match=r"the size of what .* computes is not known"):
        build(changed.SerializeToString(), precision="fp32", **RTX)


def test_open_batch_is_refused(protos):
    changed = copied(protos["fp32"])
    for value in (*changed.graph.input, *changed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(ExportError, match="open size, expected a fixed batch"):
        build(changed.SerializeToString(), precision="fp32", **RTX)


def test_convolutions_that_cannot_be_told_apart_are_refused(protos):
    changed = copied(protos["fp32"])
    for node in changed.graph.node:
        if node.op_type == "Conv":
            node.name = "conv"
    with pytest.raises(ExportError, match="two convolutions are called 'conv'"):
        build(changed.SerializeToString(), precision="fp32", **RTX)


@pytest.mark.parametrize(("graph", "sold_as"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_graph_of_another_precision_is_refused_with_the_counts(protos, graph, sold_as):
    count = sum(node.op_type == "Conv" for node in protos[graph].graph.node)
    wanted = {"fp16": f"0 of {count} convolutions in float16", "fp32": f"2 of {count} .* float32"}
    with pytest.raises(ExportError, match=f"{wanted[sold_as]}.* is no graph of {sold_as}"):
        build(protos[graph].SerializeToString(), precision=sold_as, **RTX)


def test_graph_without_convolutions_proves_nothing():
    with pytest.raises(ExportError, match="0 of 0 convolutions in float16"):
        check_precision({}, "fp16")


def test_graph_with_one_wide_convolution_is_no_half_precision(protos):
    changed = copied(protos["fp16"])
    kinds = convolutions_of(changed)
    node = next(n for n in changed.graph.node if n.op_type == "Conv" and not kinds[n.name].head)
    index = list(changed.graph.node).index(node)
    names = list(node.input)
    for position, name in enumerate(names):
        node.input[position] = f"{name} wide"
    output, node.output[0] = node.output[0], "wide"
    casts = [
        onnx.helper.make_node("Cast", [name], [f"{name} wide"], to=1, name=f"widen {name}")
        for name in names
    ]
    changed.graph.node.insert(
        index + 1, onnx.helper.make_node("Cast", ["wide"], [output], to=10, name="narrow")
    )
    for cast in casts:
        changed.graph.node.insert(index, cast)
    with pytest.raises(ExportError, match=f"no graph of fp16 \\({node.name} is float32\\)"):
        build(changed.SerializeToString(), precision="fp16", **RTX)


# What is wrong with the engine --------------------------------------------------------------------


def test_float32_engine_sold_as_fp16_is_refused_with_the_counts(protos, built, monkeypatch):
    proto = protos["fp16"]
    other, _ = built["fp32"]
    monkeypatch.setattr(tensorrt, "_run", lambda *_: other.content)
    count = sum(node.op_type == "Conv" for node in proto.graph.node)
    message = f"convolutions in float32 {count}, expected float16 {count - 2}, float32 2"
    with pytest.raises(ExportError, match=message):
        build(proto.SerializeToString(), precision="fp16", **RTX)


def test_fp16_engine_sold_as_float32_is_refused_with_the_counts(protos, fp16_engine, monkeypatch):
    monkeypatch.setattr(tensorrt, "_run", lambda *_: fp16_engine.content)
    proto = protos["fp32"]
    count = sum(node.op_type == "Conv" for node in proto.graph.node)
    message = f"in float16 {count - 2}, float32 2, expected float32 {count} as in the graph"
    with pytest.raises(ExportError, match=message):
        build(proto.SerializeToString(), precision="fp32", **RTX)


@pytest.mark.parametrize(
    ("what", "with_", "message"),
    [
        (b"main {\n", b"mane {\n", "program is not found"),
        (b"corrltn={", b"convltn={", r"\d+ of the graph's \d+ convolutions are not found"),
        (b"[ONNX Layer: ", b"[ONNX Shape: ", r"(\d+) of the graph's \1 convolutions are not found"),
        (b"type=half", b"type=quar", "unknown type quar"),
        (b'input={"', b'inlet={"', "a convolution of the engine cannot be read: corrltn="),
        (b"tf32=0", b"tf32=1", "has tf32=1, expected 0"),
        (b"\n  tf32=", b"\n  TF32=", "has tf32=nothing, expected 0"),
        (b"accelerators={sm89 }", b"accelerators={sm80 }", "accelerators={sm80 }, expected {sm89"),
    ],
)
def test_engine_that_cannot_be_read_is_not_sold(
    protos, fp16_engine, monkeypatch, what, with_, message
):
    assert what in fp16_engine.content
    changed = fp16_engine.content.replace(what, with_)
    monkeypatch.setattr(tensorrt, "_run", lambda *_: changed)
    with pytest.raises(ExportError, match=message):
        build(protos["fp16"].SerializeToString(), precision="fp16", **RTX)


def test_one_wide_convolution_in_the_engine_is_noticed(protos, fp16_engine):
    expected = convolutions_of(protos["fp16"])
    census = census_of_plan(fp16_engine.content, "sm89", "none")
    prove(census, expected)
    for place in range(len(census.convolutions)):
        convolutions = list(census.convolutions)
        wrong = "float32" if convolutions[place].weights == "float16" else "float16"
        convolutions[place] = convolutions[place]._replace(weights=wrong)
        with pytest.raises(ExportError, match="one that differs"):
            prove(census._replace(convolutions=tuple(convolutions)), expected)


# TensorRT -----------------------------------------------------------------------------------------


def layer(name, kind, type_, nodes, weights=None):
    """One entry as the documentation of TensorRT's engine inspector shows it."""
    tensor = {"Location": "Device", "Dimensions": [1, 4, 16, 32, 16], "Format/Datatype": type_}
    entry = {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": f"{name} in", **tensor}],
        "Outputs": [{"Name": f"{name} out", **tensor}],
        "TacticName": "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32",
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }
    return entry | ({"Weights": {"Type": weights, "Count": 432}} if weights else {})


def test_inspection_of_a_tensorrt_engine_is_read():
    layers = [
        layer("cast", "kgen", "Row major linear FP32", ["conv_1", "cast_1"]),
        layer("one", "CaskConvolution", "Channel major FP16 format where channel % 8 == 0",
              ["conv_1", "leaky_1"], "Half"),
        layer("two", "kgen", "Half", ["conv_2"]),
        layer("three", "CaskConvolution", "Float", ["head"], "Float"),
    ]  # fmt: skip
    census = census_of_inspection(json.dumps({"Layers": layers, "Bindings": ["moving"]}))
    assert set(census.convolutions) == {
        Convolution(frozenset({"conv_1", "leaky_1"}), "float16", "float16"),
        Convolution(frozenset({"conv_2"}), "float16", "float16"),
        Convolution(frozenset({"head"}), "float32", "float32"),
        Convolution(frozenset({"cast_1"}), "float32", "float32"),
    }
    assert census.tensors == {"float16": 4, "float32": 4}
    assert census.nbytes == 4 * 16 * 32 * 16 * 4 * (2 + 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layers cannot be read"),
        ('{"Bindings": []}', "layers cannot be read: 'Layers'"),
        ('{"Layers": ["conv_1", "conv_2"]}', "names of layers only"),
        (json.dumps({"Layers": [layer("a", "conv", "Ternary", ["b"])]}), "unknown type Ternary"),
    ],
)
def test_inspection_that_cannot_be_read_is_an_error(text, message):
    with pytest.raises(ExportError, match=message):
        census_of_inspection(text)


class FakeRuntime:
    """Opens any engine, and tells of it what the test says."""

    told = ""

    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        inspector = SimpleNamespace(get_engine_information=lambda form: self.told)
        return SimpleNamespace(create_engine_inspector=lambda: inspector)


@pytest.mark.parametrize(("type_", "fits"), [("Half", True), ("Float", False)])
def test_tensorrt_takes_the_same_way(protos, tensorrt_on, monkeypatch, type_, fits):
    library = tensorrt_on(90)
    if not fits:
        monkeypatch.setattr(tensorrt, "_run", lambda *_: b"an engine")
    library.Runtime = FakeRuntime
    expected = convolutions_of(protos["fp16"])
    layers = [
        layer(name, "CaskConvolution", "Float" if each.head and each.type == "float32" else type_,
              [name])
        for name, each in expected.items()
    ]  # fmt: skip
    monkeypatch.setattr(FakeRuntime, "told", json.dumps({"Layers": layers}))
    request = {"kind": "tensorrt", "precision": "fp16", "target": "sm90"}
    if fits:
        engine = build(protos["fp16"].SerializeToString(), **request)
        assert engine.versions == {"tensorrt": "11.4.0.106"}
        assert engine.types["convolution float32"] == 2
    else:
        with pytest.raises(ExportError, match=rf"in float32 {len(expected)}, expected float16"):
            build(protos["fp16"].SerializeToString(), **request)


@pytest.mark.parametrize(
    ("compatibility", "level"),
    [
        ("ampere-plus", tensorrt_rtx.HardwareCompatibilityLevel.AMPERE_PLUS),
        ("same-capability", tensorrt_rtx.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY),
    ],
)
def test_compatibility_becomes_the_level_of_tensorrt(compatibility, level):
    config = SimpleNamespace()
    tensorrt._aim(tensorrt_rtx, config, "tensorrt", "sm90", compatibility)
    assert vars(config) == {"hardware_compatibility_level": level}


def test_gpu_that_tensorrt_cannot_use_is_one_error(protos, tensorrt_on):
    def no_object(logger):
        logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "CUDA initialization failure\nwith 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    tensorrt_on(90).Builder = no_object
    with pytest.raises(ExportError, match=r"cannot start .*: CUDA initialization failure with 35"):
        build(protos["fp16"].SerializeToString(), kind="tensorrt", precision="fp16", target="sm90")


@pytest.mark.parametrize(
    ("told", "message", "hint"),
    [
        (["Error Code 2: OutOfMemory (no further information)"], "out of memory", "smaller batch"),
        (["first\nof all", "second"], "cannot build: first of all \\(and 1 more\\)", "constraints"),
        (["write: No space left on device"], "No space left", "TMPDIR"),
        ([], "gives no reason", "constraints"),
    ],
)
def test_failure_of_the_library_is_one_line_and_a_remedy(told, message, hint):
    library = tensorrt._LIBRARIES["tensorrt"]
    error = tensorrt._failure(library, "cannot build", told)
    with pytest.raises(ExportError, match=message):
        raise error
    assert "\n" not in str(error)
    assert hint in error.hint


def test_memory_that_does_not_suffice_is_one_error():
    def exhausted(network, config):
        raise MemoryError

    builder = SimpleNamespace(build_serialized_network=exhausted)
    with pytest.raises(ExportError, match="out of memory while building"):
        tensorrt._run(tensorrt_rtx, builder, None, SimpleNamespace(), None)


# The timing cache ---------------------------------------------------------------------------------


class FakeConfig:
    """``IBuilderConfig`` as far as timing caches go."""

    def __init__(self, logger, fits=True):
        self.logger, self.fits, self.cache = logger, fits, None

    def create_timing_cache(self, content):
        if content.startswith(b"damaged"):
            self.logger.errors.append("not a timing cache")
        return SimpleNamespace(content=content, serialize=lambda: b"times of " + content)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.content and not self.fits:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


@pytest.mark.parametrize(
    ("content", "fits", "used", "warning"),
    [
        (None, True, b"", None),
        (b"good", True, b"good", None),
        (b"damaged", True, b"", "not used: not a timing cache"),
        (b"foreign", False, b"", "not used: of another GPU or library"),
    ],
)
def test_timing_cache_is_used_where_it_fits(tmp_path, caplog, content, fits, used, warning):
    path = tmp_path / "cache"
    if content is not None:
        path.write_bytes(content)
    logger = SimpleNamespace(errors=[])
    config = FakeConfig(logger, fits)
    tensorrt.read_timing_cache(config, path, logger)
    assert config.cache.content == used
    assert [warning in text for text in caplog.messages] == ([True] if warning else [])


def test_timing_cache_that_cannot_be_read_is_left_out(tmp_path, caplog):
    logger = SimpleNamespace(errors=[])
    config = FakeConfig(logger)
    tensorrt.read_timing_cache(config, tmp_path, logger)
    assert config.cache.content == b""
    assert "Is a directory" in caplog.text


def test_timing_cache_is_written_whole(tmp_path):
    config = FakeConfig(SimpleNamespace(errors=[]))
    config.cache = config.create_timing_cache(b"new")
    path = tmp_path / "folder" / "cache"
    tensorrt.write_timing_cache(config, path)
    assert path.read_bytes() == b"times of new"
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_keeps_the_old_timing_cache(tmp_path, monkeypatch, caplog):
    path = tmp_path / "cache"
    path.write_bytes(b"old")

    def full(self, content):
        self.open("wb").close()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    config = FakeConfig(SimpleNamespace(errors=[]))
    config.cache = config.create_timing_cache(b"new")
    tensorrt.write_timing_cache(config, path)
    assert "not kept: No space left" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_tensorrt_keeps_a_timing_cache_for_each_version_and_gpu(
    protos, tensorrt_on, tmp_path, monkeypatch
):
    tensorrt_on(90)
    seen = []
    for name in ("read_timing_cache", "write_timing_cache"):
        monkeypatch.setattr(tensorrt, name, lambda config, path, *_: seen.append(path))
    monkeypatch.setattr(tensorrt, "_run", lambda *_: b"an engine")
    monkeypatch.setattr(tensorrt, "_inspected", lambda *_: '{"Layers": []}')
    with pytest.raises(ExportError, match="not found in the engine"):
        build(
            protos["fp32"].SerializeToString(),
            kind="tensorrt",
            precision="fp32",
            target="sm90",
            timing_cache=tmp_path,
        )
    assert seen == [tmp_path / "tensorrt-11.4.0.106-sm90.timing"] * 2
