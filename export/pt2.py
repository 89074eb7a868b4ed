"""The network as ``.pt2``: what torch itself runs, without the code of the model.

For the CPU this is an exported program, a list of torch's own operators with the folded weights.
AOTInductor would compile it instead, and on the CPU loses: at 160x192x160 on two cores its code
takes 7 to 8.5 s in fp32 and 9 to 12 s in bf16, after two minutes of compiling, where these
operators take 3.9 and 2.9 s. It makes loops of its own of the upsampling and the normalisation,
which torch has by hand for channels_last_3d.

For a GPU it is an AOTInductor package with the project's Triton kernels inside.

Loading either is trusted as far as the file is: torch falls back to unpickling what it cannot read
otherwise, and a package for a GPU is machine code. The engine therefore opens a file only after its
hash is found to be the manifest's.
"""

import io
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulae_rt.export.config import Missing
from ulae_rt.kernels import _launch
from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import channel_multiple
from ulae_rt.model.checkpoint import PRECISIONS
from ulae_rt.model.program import InferenceProgram


class BuiltProgram(NamedTuple):
    """A ``.pt2`` file that has been built.

    Attributes:
        content: the file.
        types: how many nodes of a kind compute in which type.
        versions: library to version that made it.
    """

    content: bytes
    types: dict[str, int]
    versions: dict[str, str]


def missing(target: str) -> Missing | None:
    """What this machine lacks to build for ``cpu`` or ``smNN``; None if nothing."""
    if target == "cpu":
        return None
    hint = f"export on a machine with a GPU of {target}; --target cpu and ONNX need none"
    if not torch.cuda.is_available():
        return Missing("AOTInductor builds on the GPU that it builds for, and there is none", hint)
    major, minor = torch.cuda.get_device_capability()
    if target != f"sm{major}{minor}":
        return Missing(f"this machine's GPU is sm{major}{minor}, and {target} was asked for", hint)
    if not _launch.TRITON_INSTALLED:
        return Missing("triton is not installed", "pip install 'ulae-rt[gpu]'")
    return None


def build(
    model: UlaeNet, shape: tuple[int, int, int], *, precision: str, batch: int, target: str
) -> BuiltProgram:
    """Write the network as a ``.pt2`` file.

    Args:
        model: in eval mode on the CPU with float32 parameters; it is not changed.
        shape: (D, H, W) of the grid.
        precision: of the features: ``fp32``, ``fp16`` or ``bf16``.
        batch: pairs a run takes.
        target: ``cpu``, or the ``smNN`` of this machine's GPU.
    """
    if target == "cpu":
        program = trace_for_cpu(model, shape, precision=precision, batch=batch)
        content = _saved(program)
    else:
        program = trace_for_gpu(model, shape, precision=precision, batch=batch, device="cuda")
        content = _compiled(program)
    versions = {"torch": str(torch.__version__)}
    if target != "cpu":
        import triton

        versions |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return BuiltProgram(content, _types(program), versions)


def with_heads_of(model: UlaeNet, content: bytes) -> bytes:
    """A program for the CPU with another network's heads; building one anew takes much longer.

    Args:
        model: of the same structure.
        content: of :func:`build`.
    """
    program = torch.export.load(io.BytesIO(content))
    for name, value in program.state_dict.items():
        if ".heads." in name:
            value.data.copy_(model.get_parameter(name.removeprefix("model.")).data)
    return _saved(program)


def trace_for_cpu(
    model: UlaeNet, shape: tuple[int, int, int], *, precision: str, batch: int
) -> torch.export.ExportedProgram:
    """The operators that torch's CPU runs for one batch, sizes and slices written out."""
    with torch.no_grad(), _launch.tracing_for_cpu():
        return torch.export.export(
            InferenceProgram(model, precision), _example(shape, batch, "cpu")
        )


def trace_for_gpu(
    model: UlaeNet, shape: tuple[int, int, int], *, precision: str, batch: int, device: str
) -> torch.export.ExportedProgram:
    """Torch's convolutions and the project's Triton kernels, launches written out."""
    from ulae_rt.export._launches import launches

    multiple = channel_multiple(PRECISIONS[precision] or torch.float32, "cuda")
    program = InferenceProgram(model, precision, multiple).to(device)
    with torch.no_grad():
        exported = torch.export.export(program, _example(shape, batch, device))
        return launches(exported)


def _saved(program: torch.export.ExportedProgram) -> bytes:
    # Not in the file: two volumes of zeros, and the exporting machine's source lines of every node.
    program._example_inputs = None
    for node in program.graph.nodes:
        for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(note, None)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # It takes a weight in channels_last_3d for a part of a larger tensor; it is saved whole.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _compiled(program: torch.export.ExportedProgram) -> bytes:
    from ulae_rt.export._launches import traceable

    with tempfile.TemporaryDirectory() as folder, traceable():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "net.pt2")
        )
        return Path(path).read_bytes()


def _example(shape: tuple[int, int, int], batch: int, device: str) -> tuple[Tensor, Tensor]:
    # Two tensors: one given twice would be traced as one input.
    images = torch.zeros(2, batch, 1, *shape, device=device)
    return images[0].clone(), images[1].clone()


def _types(program: torch.export.ExportedProgram) -> dict[str, int]:
    found: Counter[str] = Counter()
    for node in program.graph.nodes:
        value: Any = node.meta.get("val")
        if isinstance(value, Tensor) and "conv" in str(node.target):
            found[f"convolution {str(value.dtype).removeprefix('torch.')}"] += 1
    return dict(sorted(found.items()))
