"""What a built engine computes in, read from the engine itself, against what its graph computes in.

A strongly typed library should keep the graph's types, and libraries have built float32 for half
precision without a word. So the types are read from each engine, and an engine whose types cannot
be read is refused.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ulae_rt.errors import ExportError, UsageError
from ulae_rt.export.census import values_of

DEFECT_HINT = "this is a defect of ulae_rt; nothing was written"

TYPES_UNKNOWN_HINT = (
    "this engine is not written, because the types it computes in cannot be read from it; install "
    "the versions of constraints.txt, and report it if they are installed"
)


class Expected(NamedTuple):
    """A convolution of the graph: its type, and whether it makes a displacement."""

    type: str
    head: bool


class Convolution(NamedTuple):
    """One convolution of a built engine: the ONNX nodes in it, and the types it reads."""

    nodes: frozenset[str]
    input: str
    weights: str


class Census(NamedTuple):
    """What a built engine says about itself.

    Attributes:
        convolutions: all of them.
        tensors: how many there are of each type.
        nbytes: what all kernels read and write, every tensor once a kernel.
        device_bytes: working memory; None if it is not told.
    """

    convolutions: tuple[Convolution, ...]
    tensors: dict[str, int]
    nbytes: int
    device_bytes: int | None


def convolutions_of(proto: Any) -> dict[str, Expected]:
    """The convolutions of an ONNX model by the names of their nodes.

    Raises:
        ExportError: if two have one name, or none, and could not be told apart in the engine; or
            if what one computes has no known size.
    """
    values = values_of(proto)
    found: dict[str, Expected] = {}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            if not node.name or node.name in found:
                raise ExportError(
                    f"the graph is off: two convolutions are called {node.name!r}",
                    DEFECT_HINT,
                )
            output = values.get(node.output[0])
            if output is None or len(output.shape) != 5:
                raise ExportError(
                    f"the graph is off: the size of what {node.name} computes is not known",
                    DEFECT_HINT,
                )
            found[node.name] = Expected(values[node.input[1]].type, head=output.shape[1] == 3)
    return found


def check_precision(convolutions: dict[str, Expected], precision: str) -> None:
    """The graph is of the precision: all its convolutions, but for heads that stay in float32.

    Raises:
        ExportError: with the counts.
    """
    wanted = {"fp32": "float32", "fp16": "float16"}.get(precision)
    if wanted is None:
        raise UsageError(f"precision is {precision!r}, expected fp32 or fp16")
    counts = Counter(each.type for each in convolutions.values())
    others = [
        name
        for name, each in convolutions.items()
        if each.type != wanted and not (each.head and each.type == "float32")
    ]
    if others or not counts[wanted]:
        raise ExportError(
            f"the graph has {counts[wanted]} of {len(convolutions)} convolutions in {wanted}, "
            f"expected all but displacement heads: it is no graph of {precision}"
            + (f" ({others[0]} is {convolutions[others[0]].type})" if others else ""),
            f"export the weights as {precision}",
        )


def prove(census: Census, expected: dict[str, Expected]) -> None:
    """Every convolution of the graph is in the engine and reads the type it has in the graph.

    Args:
        census: of the engine.
        expected: of :func:`convolutions_of`.

    Raises:
        ExportError: with the counts.
    """
    types: dict[str, set[str]] = {name: set() for name in expected}
    for convolution in census.convolutions:
        for name in convolution.nodes & types.keys():
            types[name] |= {convolution.input, convolution.weights}
    absent = [name for name, found in types.items() if not found]
    if absent:
        raise ExportError(
            f"{len(absent)} of the graph's {len(expected)} convolutions are not found in the "
            f"engine, {absent[0]} among them: its types are not known",
            TYPES_UNKNOWN_HINT,
        )
    wrong = [name for name, found in types.items() if found != {expected[name].type}]
    if wrong:
        wanted = _counted(each.type for each in expected.values())
        found = _counted("+".join(sorted(each)) for each in types.values())
        raise ExportError(
            f"the engine has convolutions in {found}, expected {wanted} as in the graph; "
            f"{wrong[0]} is one that differs",
            TYPES_UNKNOWN_HINT,
        )


def _counted(types: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(types).items()))


_TYPES = {
    "half": ("float16", 2),
    "float": ("float32", 4),
    "bf16": ("bfloat16", 2),
    "bfloat16": ("bfloat16", 2),
    "fp16": ("float16", 2),
    "fp32": ("float32", 4),
    "int8": ("int8", 1),
    "int32": ("int32", 4),
    "int64": ("int64", 8),
    "bool": ("bool", 1),
}


class _Tensor(NamedTuple):
    type: str
    nbytes: int


# One line each: a tensor, and an operation of the network's program.
_TENSOR = re.compile(
    r'^\s*(?:sub_)?tensor=\{.*? dims=\{ ([\d ]*)\}.*? name="([^"]+)".* type=(\w+) \}$', re.MULTILINE
)
_ARGUMENTS = re.compile(r" (args|input|output|input_args|output_args)=\{([^}]*)\}")


def census_of_plan(content: bytes, target: str, compatibility: str) -> Census:
    """Read a TensorRT-RTX engine's program, which its file holds as text.

    The library itself opens an engine only on a machine with a GPU. The format is not documented:
    whatever is not found here is an error, and such an engine is refused.

    Args:
        content: the engine.
        target: what it was built for, ``"sm89"``.
        compatibility: of :data:`COMPATIBILITIES`.

    Raises:
        ExportError: if there is no such program, it is for another GPU, or it may use TF32.
    """
    convolutions: list[Convolution] = []
    tensors: Counter[str] = Counter()
    nbytes = device_bytes = 0
    for header, descriptors, operations in _programs(content):
        expected = {
            "accelerators": f"{{{target} }}",
            "tf32": "0",
            "hardware_forward_compatibility": str(int(compatibility == "ampere-plus")),
        }
        for name, value in expected.items():
            found = re.search(rf"^\s*{name}=(.*)$", header, re.MULTILINE)
            if found is None or found[1] != value:
                raise ExportError(
                    f"the engine has {name}={found[1] if found else 'nothing'}, expected {value}",
                    TYPES_UNKNOWN_HINT,
                )
        stored = {
            name: _tensor(type_, sizes.split())
            for sizes, name, type_ in _TENSOR.findall(descriptors)
        }
        tensors.update(tensor.type for tensor in stored.values())
        device_bytes += sum(
            int(size) for size in re.findall(r"region = \{ name=devmem size=(\d+)", header)
        )
        for line in operations.splitlines():
            arguments = {
                kind: re.findall(r'"([^"]+)"', names) for kind, names in _ARGUMENTS.findall(line)
            }
            used = {name for names in arguments.values() for name in names}
            nbytes += sum(stored[name].nbytes for name in used & stored.keys())
            # A convolution alone, or with what was fused to it.
            if line.lstrip().startswith("corrltn=") or "backbone=conv" in line:
                inputs = arguments.get("input", []) or arguments.get("input_args", [])
                if len(inputs) < 2 or not stored.keys() >= set(inputs[:2]):
                    raise ExportError(
                        f"a convolution of the engine cannot be read: {line.strip()[:80]}",
                        TYPES_UNKNOWN_HINT,
                    )
                nodes = frozenset(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line))
                convolutions.append(Convolution(nodes, *(stored[n].type for n in inputs[:2])))
    return Census(tuple(convolutions), dict(tensors), nbytes, device_bytes)


def _tensor(type_: str, sizes: Iterable[str | int]) -> _Tensor:
    if type_.lower() not in _TYPES:
        raise ExportError(
            f"the engine has a tensor of the unknown type {type_}", TYPES_UNKNOWN_HINT
        )
    name, width = _TYPES[type_.lower()]
    return _Tensor(name, math.prod(map(int, sizes)) * width)


def _programs(content: bytes) -> Iterator[tuple[str, str, str]]:
    """Header, tensors and operations of every part of the network.

    After them come, for any GPU, ``{*}``, the fusions the runtime has to choose between.
    """
    found = False
    for start in re.finditer(rb"header \{\n", content):
        tensors = content.find(b"descriptors {\n", start.end())
        main = content.find(b"main {\n", start.end())
        end = content.find(b"\n}", main)
        if -1 in (tensors, main, end) or tensors > main:
            break
        header = content[start.end() : tensors].decode("latin-1")
        if "accelerators={*}" not in header:
            found = True
            yield (
                header,
                content[tensors:main].decode("latin-1"),
                content[main + len(b"main {\n") : end].decode("latin-1"),
            )
    if not found:
        raise ExportError("the engine's program is not found in its file", TYPES_UNKNOWN_HINT)


# Of a layer that only generates, moves or converts values around a convolution, and may name it.
_AROUND = ("kgen", "Reformat", "NoOp", "Cast")


def census_of_inspection(text: str) -> Census:
    """Read what TensorRT's ``IEngineInspector`` says, in the detailed format of its documentation.

    Not yet met by a real engine: building one takes a GPU, and none was at hand when this was
    written. A format that differs ends in :func:`prove`, which refuses what it does not find.

    Args:
        text: JSON.

    Raises:
        ExportError: if it is something else.
    """
    try:
        layers = json.loads(text)["Layers"]
        if not all(isinstance(layer, dict) for layer in layers):
            raise ValueError("names of layers only")
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"the engine's layers cannot be read: {error}", TYPES_UNKNOWN_HINT
        ) from error
    tensors: dict[str, _Tensor] = {}
    convolutions: dict[bool, list[Convolution]] = {False: [], True: []}
    nbytes = 0
    for layer in layers:
        inputs, outputs = (
            [_inspected_tensor(each) for each in layer.get(key, [])]
            for key in ("Inputs", "Outputs")
        )
        used = dict(inputs + outputs)
        tensors.update(used)
        nbytes += sum(tensor.nbytes for tensor in used.values())
        nodes = frozenset(re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata", "")))
        if inputs and nodes:
            read = inputs[0][1].type
            weights = layer.get("Weights", {}).get("Type")
            convolutions[layer.get("LayerType") in _AROUND].append(
                Convolution(nodes, read, _tensor(weights, ()).type if weights else read)
            )
    # A node counts in what merely surrounds it only if nothing else computes it.
    computed = frozenset().union(*(each.nodes for each in convolutions[False]))
    around = [
        each._replace(nodes=each.nodes - computed)
        for each in convolutions[True]
        if each.nodes - computed
    ]
    counted = Counter(tensor.type for tensor in tensors.values())
    return Census((*convolutions[False], *around), dict(counted), nbytes, None)


def _inspected_tensor(entry: dict[str, Any]) -> tuple[str, _Tensor]:
    """Of ``"Half"`` as of ``"Channel major FP16 format where channel % 8 == 0"``."""
    told = entry.get("Format/Datatype") or entry.get("Datatype") or "nothing"
    words = [word for word in re.findall(r"\w+", told.lower()) if word in _TYPES]
    return entry["Name"], _tensor(words[0] if words else told, entry["Dimensions"])
