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
from ulae_rt.export.census import values_of
from ulae_rt.export.graph import InferenceGraph
from ulae_rt.model import UlaeNet
from ulae_rt.model.ulae_net import STEPS
from ulae_rt.optional import require

OPSET = 20  # the first whose GridSample is defined for volumes
INPUTS = ("moving", "fixed")
OUTPUTS = ("moved", "disp")
BATCH = "batch"  # what an open batch size is called

# Traced operator -> what it must have become, one for one. Convolutions are missing on purpose:
# the exporter merges those of the fixed path that every step repeats.
_TRANSLATIONS = {
    "aten.grid_sampler.default": "GridSample",
    "aten.rsqrt.default": "Reciprocal",
    "aten.leaky_relu.default": "LeakyRelu",
    "aten.upsample_trilinear3d.vec": "Resize",
    "aten.avg_pool3d.default": "AveragePool",
}
_FLOAT32, _FLOAT16 = 1, 10  # onnx.TensorProto's numbers of them
_HINT = "install the versions of constraints.txt; if they are, this is a defect of ulae_rt"


def onnx_from_model(
    model: UlaeNet,
    shape: tuple[int, int, int],
    *,
    precision: str = "fp32",
    batch: int | None = 1,
) -> Any:
    """Trace ``model`` into one self-contained ONNX model and check the result.

    Args:
        model: in eval mode, float32, on the CPU.
        shape: (D, H, W), multiples of 16.
        precision: of :data:`ulae_rt.export.graph.PRECISIONS`.
        batch: B, the number of pairs of one run; None leaves it open.

    Returns:
        ``onnx.ModelProto``: ``moving``, ``fixed`` (B, 1, D, H, W) in [0, 1] to ``moved``
        (B, 1, D, H, W) and ``disp`` (B, 3, D, H, W) in voxels, all float32.

    Raises:
        BackendUnavailable: if onnx or onnxscript is not installed.
        ExportError: if the graph cannot be made or is not the network.
    """
    require("onnxscript", "export")
    # Traced with two pairs, an open batch is not taken for the constant 1.
    example = torch.zeros(2 if batch is None else batch, 1, *shape)
    dynamic = {0: torch.export.Dim(BATCH)} if batch is None else None
    with torch.no_grad(), _known_noise_hidden():
        try:
            program = torch.onnx.export(
                InferenceGraph(model, precision),
                (example, example.clone()),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_shapes=None if dynamic is None else (dynamic, dynamic),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"torch cannot export the network: {reason}", _HINT) from error
    assert program is not None
    assert program.exported_program is not None
    _simplify(program.model)
    proto = program.model_proto
    proto.producer_name, proto.producer_version = "ulae_rt", __version__
    _check_translation(program.exported_program.graph, proto)
    check_graph(proto, shape, precision=precision, batch=batch)
    return proto


def _simplify(model: Any) -> None:
    """Fold constants and merge what is computed twice, as the fixed path of the three steps is.

    torch's own clean-up also searches for 150 patterns, of which the network has none: half of the
    time of an export.
    """
    ir = require("onnx_ir", "export")
    optimizer = require("onnxscript.optimizer", "export")
    passes = require("onnx_ir.passes.common", "export")
    passes.InlinePass()(model)
    optimizer.fold_constants_ir(model)
    for node in model.graph:
        if node.op_type == "Conv" and not node.inputs[2].const_value.numpy().any():
            # torch gives a convolution without a bias one of zeros, and of a shape that TensorRT
            # refuses.
            node.resize_inputs(2)
        if node.op_type == "Reshape" and node.inputs[1].const_value is None:
            # Nothing but the batch is open: -1 stands for it, where torch looks it up at run time.
            sizes = [-1, *(int(size) for size in node.outputs[0].shape[1:])]
            name = f"{node.outputs[0].name}.sizes"
            constant = ir.Value(name=name, const_value=ir.tensor(sizes, name=name))
            model.graph.register_initializer(constant)
            node.replace_input_with(1, constant)
    for each in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        # Names of source files and their lines: of no use to a reader of the model.
        passes.ClearMetadataAndDocStringPass(),
    ):
        each(model)


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
            # Both images have one batch size, which is meant.
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used")
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


def check_graph(
    proto: Any, shape: tuple[int, int, int], *, precision: str, batch: int | None
) -> None:
    """The model is valid and standard, has the sizes and types it should, and samples linearly.

    Args:
        proto: ``onnx.ModelProto``.
        shape: (D, H, W) that it was made for.
        precision: of :data:`ulae_rt.export.graph.PRECISIONS`.
        batch: B that it was made for; None: any.

    Raises:
        ExportError: naming the first thing that is off.
    """
    onnx = require("onnx", "export")
    try:
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the graph: {error}", _HINT) from error
    sizes = (BATCH if batch is None else batch, shape)
    for problems in (
        _problems_of_interface(proto, *sizes),
        _problems_of_values(inferred, batch),
        _problems_of_nodes(onnx, proto),
        _problems_of_types(proto, precision),
    ):
        for problem in problems:
            raise ExportError(f"the graph is off: {problem}", _HINT)


def _problems_of_interface(
    proto: Any, batch: int | str, shape: tuple[int, int, int]
) -> Iterator[str]:
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets != {"": OPSET}:
        yield f"operator sets are {opsets}, expected the default one, {OPSET}"
    if proto.functions:
        yield f"{len(proto.functions)} model-local functions, expected none"
    for values, names in ((proto.graph.input, INPUTS), (proto.graph.output, OUTPUTS)):
        found = {value.name: _sizes(value) for value in values}
        expected = {name: [batch, 3 if name == "disp" else 1, *shape] for name in names}
        if found != expected:
            yield f"inputs or outputs are {found}, expected {expected}"
        for value in values:
            if value.type.tensor_type.elem_type != _FLOAT32:
                yield f"{value.name} is not float32"


def _problems_of_values(inferred: Any, batch: int | None) -> Iterator[str]:
    constants = {tensor.name for tensor in inferred.graph.initializer}
    for value in inferred.graph.value_info:
        if value.name in constants:  # sizes and axes are integers
            continue
        if value.type.tensor_type.elem_type not in (_FLOAT32, _FLOAT16):
            yield f"{value.name} is neither float32 nor float16"
        sizes = _sizes(value)
        fixed = sizes[1:] if batch is None else sizes
        if not sizes or not all(isinstance(size, int) and size > 0 for size in fixed):
            yield f"{value.name} has no fixed size: {sizes}"


def _problems_of_nodes(onnx: Any, proto: Any) -> Iterator[str]:
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
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
        if node.op_type == "Conv" and len(node.input) == 3:
            weight, bias = (list(constants[name].dims) for name in node.input[1:])
            if bias != weight[:1]:
                yield f"{node.name} has a bias of {bias}, expected {weight[:1]}"
        if node.op_type == "Resize":
            scales = constants.get(node.input[2]) if len(node.input) == 3 else None
            if attributes.get("mode") != b"linear":
                yield f"{node.name} resizes with {attributes.get('mode')}, expected linear"
            if scales is None or scales.data_type != _FLOAT32:
                yield f"{node.name} has no constant float32 scales"


# Operators of displacements, images and statistics. LeakyRelu, Add and their like are of both.
_ALWAYS_FLOAT32 = ("GridSample", "AveragePool", "ReduceMean", "Sqrt", "Reciprocal", "MatMul")


def _problems_of_types(proto: Any, precision: str) -> Iterator[str]:
    """Half precision where it was asked for, and nowhere else."""
    values = values_of(proto)
    features = "float32" if precision == "fp32" else "float16"
    coarse = {f"model.heads.{step}.weight" for step in range(1, STEPS)}
    for node in proto.graph.node:
        if node.op_type in _ALWAYS_FLOAT32:
            expected = "float32"
        elif node.op_type == "Conv":
            expected = "float32" if node.input[1] in coarse else features
        elif node.op_type == "Resize":
            # A displacement has three components, and features never.
            displacement = values[node.input[0]].shape[1] == 3
            expected = "float32" if displacement else features
        elif precision == "fp32":
            expected = "float32"
        else:
            continue
        for name in (node.input[0], node.output[0]):
            if values[name].type != expected:
                yield (
                    f"{node.name} ({node.op_type}) has {name} in {values[name].type}, expected "
                    f"{expected} in {precision}"
                )
        if node.op_type == "GridSample" and values[node.input[1]].type != "float32":
            yield f"{node.name} samples at {values[node.input[1]].type}, expected float32"


def _sizes(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def with_heads_of(model: UlaeNet, proto: Any) -> Any:
    """A copy of an ONNX model with another network's heads.

    Args:
        model: of the same structure as the one that ``proto`` was made from.
        proto: ``onnx.ModelProto`` of :func:`onnx_from_model`, of any precision.

    Raises:
        ExportError: if it has no such heads.
    """
    onnx = require("onnx", "export")
    changed = type(proto)()
    changed.CopyFrom(proto)
    constants = {tensor.name: tensor for tensor in changed.graph.initializer}
    for step in model.used_steps:
        name = f"model.heads.{step}.weight"
        heads = [node for node in changed.graph.node if name in node.input]
        if name not in constants or [node.op_type for node in heads] != ["Conv"]:
            raise ExportError(f"the graph is off: no convolution with the weights {name}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(constants[name].data_type)
        weight, bias = (
            model.get_parameter(f"heads.{step}.{part}").detach().contiguous().numpy().astype(dtype)
            for part in ("weight", "bias")
        )
        constants[name].CopyFrom(onnx.numpy_helper.from_array(weight, name))
        # A name of its own: equal biases (fresh ones are all zero) share one constant.
        changed.graph.initializer.append(onnx.numpy_helper.from_array(bias, f"{name}.bias"))
        del heads[0].input[2:]
        heads[0].input.append(f"{name}.bias")
    return changed
