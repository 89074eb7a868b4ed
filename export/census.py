"""What is in an ONNX model: its work, and its nodes by type."""

import math
from collections import Counter
from typing import Any, NamedTuple

from ulae_rt.errors import ExportError
from ulae_rt.manifest import Work
from ulae_rt.optional import require


def work_of(proto: Any) -> Work:
    """Operations of the convolutions (nothing else comes near them), bytes, nodes.

    Bytes are those of all nodes' inputs and outputs, each once a node: a runtime that fuses nodes
    moves less. Of a dynamic batch, the work of one pair.

    Args:
        proto: ``onnx.ModelProto``.

    Raises:
        ExportError: for a node whose sizes or types cannot be inferred.
    """
    values = values_of(proto)
    operations = moved = 0
    for node in proto.graph.node:
        names = [name for name in (*node.input, *node.output) if name]
        for name in names:
            if name not in values:
                raise ExportError(f"the graph is off: {node.name} has {name}, which has no size")
        moved += sum(values[name].nbytes for name in names)
        if node.op_type == "Conv":
            _, per_group, *kernel = values[node.input[1]].shape
            products = values[node.output[0]].elements * per_group * math.prod(kernel)
            operations += 2 * products
    return Work(operations / 1e9, moved / 1e9, len(proto.graph.node))


def types_of(proto: Any) -> dict[str, int]:
    """How many nodes of each kind compute in each type: ``"Conv float16" -> 87``.

    The type is that of a node's first result; a conversion also says what it converts from.

    Args:
        proto: ``onnx.ModelProto``.
    """
    values = values_of(proto)
    found: Counter[str] = Counter()
    for node in proto.graph.node:
        kind = f"{node.op_type} {values[node.output[0]].type}"
        if node.op_type == "Cast":
            kind = f"Cast {values[node.input[0]].type} to {values[node.output[0]].type}"
        found[kind] += 1
    return dict(sorted(found.items()))


class Value(NamedTuple):
    """One tensor of a model.

    Attributes:
        type: its elements' type by numpy's name, ``"float16"``.
        shape: its sizes, 1 for a dynamic batch.
        itemsize: bytes of an element.
    """

    type: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * self.itemsize


def values_of(proto: Any) -> dict[str, Value]:
    """Every tensor of a model by name, as far as types and sizes can be inferred.

    Args:
        proto: ``onnx.ModelProto``.
    """
    onnx = require("onnx", "export")
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph

    def value(element: int, shape: tuple[int, ...]) -> Value:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        return Value(dtype.name, shape, dtype.itemsize)

    found = {}
    for each in (*inferred.input, *inferred.output, *inferred.value_info):
        tensor = each.type.tensor_type
        shape = tuple(d.dim_value or 1 for d in tensor.shape.dim)
        found[each.name] = value(tensor.elem_type, shape)
    for each in inferred.initializer:
        found[each.name] = value(each.data_type, tuple(each.dims))
    return found
