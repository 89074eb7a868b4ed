"""The ONNX model: what it is made of, that it computes what torch does, and what is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from _support.nets import SHAPE, small_net
from ulae_rt.errors import ExportError
from ulae_rt.export.onnx import check_graph, onnx_from_model, with_heads_of

# Half precision rounds features to 11 bits; 3e-3 voxel measured where displacements reach 3.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


@pytest.fixture(scope="module")
def model():
    return small_net()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def proto(model, precision):
    return onnx_from_model(model, SHAPE, precision=precision)


def copied(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def run(proto, moving, fixed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the size it infers for an open batch is a guess, and warned of
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {"moving": moving.numpy(), "fixed": fixed.numpy()})


def assert_computes(model, proto, batch, tolerance):
    moving, fixed = torch.rand(2, batch, 1, *SHAPE, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = model.predict(moving, fixed)
    moved, disp = run(proto, moving, fixed)
    assert expected.disp.abs().amax() > 1
    np.testing.assert_allclose(disp, expected.disp.numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(moved, expected.moved.numpy(), rtol=0, atol=tolerance)


def test_it_computes_what_torch_does(model, proto, precision):
    assert_computes(model, proto, 1, TOLERANCE[precision])


@pytest.mark.slow
def test_open_batch_takes_any_number_of_pairs(model, precision):
    proto = onnx_from_model(model, SHAPE, precision=precision, batch=None)
    for value in (*proto.graph.input, *proto.graph.output):
        batch, *sizes = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [size.dim_value for size in sizes[1:]] == list(SHAPE)
    for batch in (1, 2, 3):
        assert_computes(model, proto, batch, TOLERANCE[precision])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8])
def test_fixed_batch_takes_that_many_pairs(model, batch):
    proto = onnx_from_model(model, SHAPE, precision="fp16", batch=batch)
    assert_computes(model, proto, batch, TOLERANCE["fp16"])


def test_pairs_of_a_batch_do_not_see_each_other(model):
    proto = onnx_from_model(model, SHAPE, batch=2)
    moving, fixed = torch.rand(2, 2, 1, *SHAPE)
    forwards, backwards = (run(proto, moving[order], fixed[order]) for order in ([0, 1], [1, 0]))
    for a, b in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(a, b[::-1])


def test_graph_is_standard_and_lean(proto):
    nodes = Counter(node.op_type for node in proto.graph.node)
    assert nodes["GridSample"] == 5
    # Folded weights leave no arithmetic on them; normalisation is spelt out, see graph.py.
    assert not nodes.keys() & {"Identity", "Split", "Expand", "Pad", "Shape"}
    assert "InstanceNormalization" not in nodes
    assert all(node.domain == "" for node in proto.graph.node)


def test_graph_says_nothing_about_the_machine(proto):
    content = proto.SerializeToString()
    assert str(Path.cwd()).encode() not in content
    assert b".py" not in content
    assert proto.producer_name == "ulae_rt"


def test_two_exports_are_the_same_bytes_and_hold_no_slabs(model, proto, precision):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        again = onnx_from_model(model, SHAPE, precision=precision)
    finally:
        torch.set_num_threads(threads)
    assert again.SerializeToString() == proto.SerializeToString()


def test_network_without_accumulation_exports():
    proto = onnx_from_model(small_net(accumulate=False), (16, 32, 16))
    assert sum(node.op_type == "GridSample" for node in proto.graph.node) == 1


def test_heads_of_another_network_are_put_in(model, proto, precision):
    other = small_net()
    with torch.no_grad():
        for head in other.heads.values():
            head.weight.mul_(-1.5)
            head.bias.fill_(0.3)
    changed = with_heads_of(other, proto)
    check_graph(changed, SHAPE, precision=precision, batch=1)
    assert_computes(other, changed, 1, TOLERANCE[precision])
    with pytest.raises(AssertionError):
        assert_computes(other, proto, 1, TOLERANCE[precision])


@pytest.mark.parametrize("which", range(5))
def test_nearest_for_linear_is_refused(proto, precision, which):
    broken = copied(proto)
    node = [n for n in broken.graph.node if n.op_type == "GridSample"][which]
    next(a for a in node.attribute if a.name == "mode").s = b"nearest"
    with pytest.raises(ExportError, match=rf"{node.name} samples with .*nearest"):
        check_graph(broken, SHAPE, precision=precision, batch=1)


def test_one_precision_sold_as_the_other_is_refused(proto, precision):
    other = {"fp32": "fp16", "fp16": "fp32"}[precision]
    with pytest.raises(ExportError, match=rf"node_\w+ \(\w+\) has .*expected float.. in {other}"):
        check_graph(proto, SHAPE, precision=other, batch=1)


def test_another_size_or_batch_is_refused(proto, precision):
    for shape, batch in (((16, 48, 32), 1), (SHAPE, 2), (SHAPE, None)):
        with pytest.raises(ExportError, match="inputs or outputs are"):
            check_graph(proto, shape, precision=precision, batch=batch)


def _to_float64_scales(proto):
    name = next(n for n in proto.graph.node if n.op_type == "Resize").input[2]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor).astype(np.float64)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))


def _custom_operator(proto):
    proto.graph.node[3].domain = "ulae_rt"
    proto.opset_import.append(onnx.helper.make_opsetid("ulae_rt", 1))


def _dynamic_size(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "depth"


def _other_name(proto):
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == "moving":
                node.input[index] = "image"
    proto.graph.input[0].name = "image"


def _bias_of_another_shape(proto):
    head = next(n for n in proto.graph.node if "heads" in "".join(n.input))
    (weight,) = (t for t in proto.graph.initializer if t.name == head.input[1])
    values = np.zeros((3, 2), onnx.numpy_helper.to_array(weight).dtype)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "bias"))
    head.input.append("bias")


def _computed_constant(proto):
    constant = next(t.name for t in proto.graph.initializer if t.data_type in (1, 10))
    proto.graph.node.insert(0, onnx.helper.make_node("LeakyRelu", [constant], ["x"], name="extra"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_to_float64_scales, "checker refuses|float32 scales"),
        (_custom_operator, "operator sets|standard operator|checker refuses"),
        (_dynamic_size, "inputs or outputs|fixed size"),
        (_other_name, "inputs or outputs"),
        (_bias_of_another_shape, "checker refuses|has a bias of"),
        (_computed_constant, "extra .* computes a constant"),
    ],
)
def test_graph_that_is_off_is_refused(proto, precision, change, message):
    changed = copied(proto)
    change(changed)
    with pytest.raises(ExportError, match=message):
        check_graph(changed, SHAPE, precision=precision, batch=1)


@pytest.mark.parametrize(
    ("op_type", "position", "message"),
    [
        ("GridSample", 1, "samples at float16, expected float32"),
        ("ReduceMean", 0, r"\(ReduceMean\) has rounded in float16, expected float32 in fp16"),
        ("AveragePool", 0, r"\(AveragePool\) has rounded in float16, expected float32 in fp16"),
    ],
)
def test_half_precision_in_the_wrong_place_is_refused(model, op_type, position, message):
    changed = onnx_from_model(model, (16, 32, 16), precision="fp16")
    nodes = changed.graph.node
    index, node = next((i, n) for i, n in enumerate(nodes) if n.op_type == op_type)
    cast = onnx.helper.make_node("Cast", [node.input[position]], ["rounded"], "extra", to=10)
    node.input[position] = "rounded"
    outputs = list(node.output)
    nodes.insert(index, cast)
    if op_type != "GridSample":  # its result is of the type of its image, these of their input
        widened = onnx.helper.make_node("Cast", ["narrow"], outputs, "extra_back", to=1)
        nodes[index + 1].output[0] = "narrow"
        nodes.insert(index + 2, widened)
    # Types once inferred no longer hold.
    del changed.graph.value_info[:]
    with pytest.raises(ExportError, match=message):
        check_graph(changed, (16, 32, 16), precision="fp16", batch=1)
