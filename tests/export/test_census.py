"""Work and types of a graph, against sums done by hand and the released arithmetic."""

import onnx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from _support import plain_ulae
from ulae_rt.errors import ExportError
from ulae_rt.export.census import types_of, work_of
from ulae_rt.export.onnx import onnx_from_model
from ulae_rt.model import UlaeNet

SHAPE = (32, 48, 32)  # a hundredth of 160 x 192 x 160


class Released(nn.Module):
    """The released arithmetic with nothing folded or shared, to export as it stands."""

    def __init__(self):
        super().__init__()
        self.keys = {}
        for key, value in plain_ulae.random_state("paper").items():
            self.keys[key] = key.replace(".", "_")
            self.register_buffer(self.keys[key], value.float())

    def forward(self, moving, fixed):
        state = {key: self.get_buffer(name) for key, name in self.keys.items()}
        out = plain_ulae.register(state, moving, fixed)
        return out.moved, out.disp


def released_onnx(released, shape):
    images = torch.zeros(1, 1, *shape), torch.zeros(1, 1, *shape)
    with torch.no_grad():
        exported = torch.onnx.export(released, images, dynamo=True, verbose=False, opset_version=20)
    return exported.model_proto


def small_graph():
    """Two convolutions of 2 x 3 x 3 x 3 weights and a sum, on (1, 2, 4, 4, 4), in float16."""
    make = onnx.helper
    half = onnx.TensorProto.FLOAT16
    weight = make.make_tensor("weight", half, [2, 2, 3, 3, 3], [1.0] * 108)
    attributes = {"pads": [1] * 6, "kernel_shape": [3, 3, 3]}
    nodes = [
        make.make_node("Conv", ["x", "weight"], ["a"], "first", **attributes),
        make.make_node("Conv", ["a", "weight"], ["b"], "second", strides=[2] * 3, **attributes),
        make.make_node("Add", ["b", "b"], ["c"], "sum"),
        make.make_node("Cast", ["c"], ["y"], "wide", to=onnx.TensorProto.FLOAT),
    ]
    graph = make.make_graph(
        nodes,
        "small",
        [make.make_tensor_value_info("x", half, [1, 2, 4, 4, 4])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 2, 2, 2])],
        [weight],
    )
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 20)])


def test_work_is_what_one_counts_by_hand():
    work = work_of(small_graph())
    assert work.nodes == 4
    # Output elements times 54 weights each, two operations a product.
    assert work.gflop * 1e9 == pytest.approx(2 * 54 * (128 + 16))
    # Elements: x, weight, a; a, weight, b; b, b, c in two bytes; c in two and y in four.
    assert work.gigabytes * 1e9 == pytest.approx(
        2 * ((128 + 108 + 128) + (128 + 108 + 16) + 3 * 16) + 2 * 16 + 4 * 16
    )


def test_types_are_counted_by_operator():
    assert types_of(small_graph()) == {
        "Add float16": 1, "Cast float16 to float32": 1, "Conv float16": 2,
    }  # fmt: skip


def test_graph_whose_sizes_cannot_be_inferred_is_refused():
    proto = small_graph()
    proto.graph.node[1].input[0] = "nothing"
    with pytest.raises((ExportError, onnx.shape_inference.InferenceError)):
        work_of(proto)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_graph_takes_a_sixth_less_work_than_the_released_arithmetic():
    released = Released()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        released(*torch.zeros(2, 1, 1, *SHAPE))
    done = counter.get_total_flops() / 1e9
    # Exported as it is, torch drops the unused fusions and nothing else.
    before = work_of(released_onnx(released, SHAPE))
    after, half = (
        work_of(onnx_from_model(UlaeNet().eval(), SHAPE, precision=precision))
        for precision in ("fp32", "fp16")
    )
    for work in (done, before, after, half):
        print(work)
    # 370.7 and 312 at a hundred times the voxels.
    assert done == pytest.approx(3.707, rel=0.005)
    assert after.gflop < before.gflop < done
    assert after.gflop < 3.13
    assert half.gflop == after.gflop
    assert half.gigabytes < after.gigabytes
