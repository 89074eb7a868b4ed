"""The network as an ONNX model of standard operators, and the checks that it is that."""

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ulae_rt import __version__
from ulae_rt.errors import ExportError
from ulae_rt.export.graph import InferenceGraph
from ulae_rt.model import UlaeNet
from ulae_rt.optional import require

OPSET = 20  # the first whose GridSample is defined for volumes
INPUTS = ("moving", "fixed")
OUTPUTS = ("moved", "disp")

# Traced operator -> what it must have become, one for one. Convolutions are missing on purpose:
# the exporter merges those of the fixed path that every step repeats.
_TRANSLATIONS = {
    "aten.grid_sampler.default": "GridSample",
    "aten.rsqrt.default": "Reciprocal",
    "aten.leaky_relu.default": "LeakyRelu",
    "aten.upsample_trilinear3d.vec": "Resize",
    "aten.avg_pool3d.default": "AveragePool",
}
_HINT = "install the versions of constraints.txt; if they are, this is a defect of ulae_rt"


def onnx_from_model(model: UlaeNet, shape: tuple[int, int, int]) -> Any:
    """Trace ``model`` into one self-contained ONNX model and check the result.

    Args:
        model: in eval mode, float32, on the CPU.
        shape: (D, H, W), multiples of 16.

    Returns:
        ``onnx.ModelProto``: ``moving``, ``fixed`` (1, 1, D, H, W) in [0, 1] to ``moved``
        (1, 1, D, H, W) and ``disp`` (1, 3, D, H, W) in voxels, all float32.

    Raises:
        BackendUnavailable: if onnx or onnxscript is not installed.
        ExportError: if the graph cannot be made or is not the network.
    """
    require("onnxscript", "export")
    passes = require("onnx_ir.passes.common", "export")
    example = torch.zeros(1, 1, *shape)
    with torch.no_grad(), _known_noise_hidden():
        try:
            program = torch.onnx.export(
                InferenceGraph(model),
                (example, example.clone()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"torch cannot export the network: {reason}", _HINT) from error
    assert program is not None
    assert program.exported_program is not None
    # Names of source files and their lines: of no use to a reader of the model.
    passes.ClearMetadataAndDocStringPass()(program.model)
    proto = program.model_proto
    proto.producer_name, proto.producer_version = "ulae_rt", __version__
    _check_translation(program.exported_program.graph, proto)
    check_graph(proto, shape)
    return proto


@contextlib.contextmanager
def _known_noise_hidden() -> Iterator[None]:
    """What torch's exporter says about itself, and nobody who exports can act on."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed", four times
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
            )
            yield
    finally:
        registration.setLevel(level)


def _check_translation(traced: torch.fx.Graph, proto: Any) -> None:
    """Every traced operator of importance is there, once: none dropped, none split."""
    expected = Counter(_TRANSLATIONS.get(str(node.target), "") for node in traced.nodes)
    found = Counter(node.op_type for node in proto.graph.node)
    for name in _TRANSLATIONS.values():
        if found[name] != expected[name]:
            raise ExportError(
                f"the graph has {found[name]} {name} nodes, expected {expected[name]} as traced",
                _HINT,
            )


def check_graph(proto: Any, shape: tuple[int, int, int]) -> None:
    """The model is valid, standard, float32, of fixed sizes, and samples linearly.

    Args:
        proto: ``onnx.ModelProto``.
        shape: (D, H, W) that it was made for.

    Raises:
        ExportError: naming the first thing that is off.
    """
    onnx = require("onnx", "export")
    try:
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the graph: {error}", _HINT) from error
    for problem in _problems(onnx, proto, inferred, shape):
        raise ExportError(f"the graph is off: {problem}", _HINT)


def _problems(onnx: Any, proto: Any, inferred: Any, shape: tuple[int, int, int]) -> Iterator[str]:
    graph = proto.graph
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets != {"": OPSET}:
        yield f"operator sets are {opsets}, expected the default one, {OPSET}"
    if proto.functions:
        yield f"{len(proto.functions)} model-local functions, expected none"
    for values, names in ((graph.input, INPUTS), (graph.output, OUTPUTS)):
        found = {value.name: _sizes(value) for value in values}
        expected = {name: [1, 3 if name == "disp" else 1, *shape] for name in names}
        if found != expected:
            yield f"inputs or outputs are {found}, expected {expected}"
    float32 = onnx.TensorProto.FLOAT
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for value in [*graph.input, *graph.output, *inferred.graph.value_info]:
        if value.name in constants:  # sizes and axes are integers
            continue
        if value.type.tensor_type.elem_type != float32:
            yield f"{value.name} is not float32"
        if 0 in _sizes(value) or not _sizes(value):
            yield f"{value.name} has no fixed size"
    for node in graph.node:
        if node.domain:
            yield f"{node.name} is a {node.domain}::{node.op_type}, expected a standard operator"
        if node.input and all(name in constants for name in node.input if name):
            yield f"{node.name} ({node.op_type}) computes a constant"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "GridSample":
            setting = (
                attributes.get("mode", b"linear"),
                attributes.get("padding_mode", b"zeros"),
                attributes.get("align_corners", 0),
            )
            if setting != (b"linear", b"zeros", 0):
                yield f"{node.name} samples with {setting}, expected linear, zeros, 0"
        if node.op_type == "Resize":
            scales = constants.get(node.input[2]) if len(node.input) == 3 else None
            if attributes.get("mode") != b"linear":
                yield f"{node.name} resizes with {attributes.get('mode')}, expected linear"
            if scales is None or scales.data_type != float32:
                yield f"{node.name} has no constant float32 scales"


def _sizes(value: Any) -> list[int]:
    return [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
