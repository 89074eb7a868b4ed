"""Everything that can run the exported network, each in a process of its own, in turn.

Against the released arithmetic in eager float32 as in the network's suite. An engine's process
opens a file and nothing else; what it takes and gives lies in the host's memory, as a server calls
it, so that on a GPU both copies are in its time.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.case import FULL, RELEASED, Case, Measured, Setting, Sizes
from harness.processes import Child, child
from suites import network
from ulae_rt.allocator import keep_freed_memory

NAME = "engines"
VARIANT = "paper"
CPU = ("torch fp32", "torch bf16", "pt2 fp32", "pt2 bf16", "onnxruntime fp32", "onnxruntime fp16")
GPU = ("torch fp16", "torch.compile fp16", "pt2 fp16", "onnxruntime fp16", "tensorrt fp16")
# What is opened in seconds, for the throughput by batch on a CPU.
QUICK = ("torch fp32", "torch bf16")
BATCHES = (1, 2, 4, 8)
CPU_BATCHES = (1, 4)


def cases(setting: Setting) -> list[Case]:
    every = GPU if setting.device == "cuda" else CPU
    if setting.small:
        wanted = [(network.SMALL, 1, every)]
    elif setting.device == "cuda":
        # Building and compiling take a minute an artefact: once is what time allows.
        wanted = [(FULL, 1, every), *((FULL, batch, GPU[:1]) for batch in BATCHES[1:])]
    else:
        wanted = [(FULL, 1, every), *((network.HALF, batch, QUICK) for batch in CPU_BATCHES)]
    return [
        Case(
            NAME,
            "host to host",
            (RELEASED, *names),
            partial(measured, names, sizes, batch),
            sizes,
            batch,
            precision="fp32 images",
            baseline=RELEASED,
            own=names,
            error_unit="voxel, largest",
            about_seconds=270.0 if len(names) > len(QUICK) else 40.0,
        )
        for sizes, batch, names in wanted
    ]


def left_out(name: str) -> str:
    """Why this machine cannot run a contender; "" when it can."""
    kind, _, precision = name.partition(" ")
    if precision == "bf16" and not network.has_bf16():
        return "this processor has no bf16 arithmetic"
    if name == "onnxruntime fp16" and network.device() == "cpu":
        return "on a CPU ONNX Runtime computes fp16 in fp32, and is slower by it"
    needs = {
        "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
        "tensorrt": ("onnx", "onnxscript", "tensorrt"),
    }
    for library in needs.get(kind, ()):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    if kind == "onnxruntime" and network.device() == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime runs on the CPU only"
    return ""


def artefact(name: str, sizes: Sizes, batch: int, folder: Path) -> Path | None:
    """The file that a contender opens; None for those that run the model."""
    kind, _, precision = name.partition(" ")
    if kind not in ("pt2", "onnxruntime", "tensorrt"):
        return None
    net = network.package(VARIANT, None)
    path = folder / f"{kind}-{precision}-{batch}"
    target = "cpu"
    if network.device() == "cuda":
        major, minor = torch.cuda.get_device_capability()
        target = f"sm{major}{minor}"
    if kind == "pt2":
        from ulae_rt.export import pt2

        built = pt2.build(net, sizes, precision=precision, batch=batch, target=target)
        path.write_bytes(built.content)
        return path
    from ulae_rt.export.onnx import onnx_from_model

    content = onnx_from_model(net, sizes, precision=precision, batch=batch).SerializeToString()
    if kind == "tensorrt":
        from ulae_rt.export import tensorrt

        content = tensorrt.build(
            content, kind=kind, precision=precision, target=target, compatibility="none",
            timing_cache=None, progress=None,
        ).content  # fmt: skip
    path.write_bytes(content)
    return path


def prepare(
    name: str, sizes: Sizes, batch: int, path: str | None, result: str
) -> Callable[[], object]:
    """A contender's process: moved images and displacements of the same pairs, its own way."""
    kind, _, precision = name.partition(" ")
    if path is not None:
        run = engine(kind, Path(path), network.images(sizes, batch, "cpu"))
    elif name == RELEASED:
        run = network.released(VARIANT, network.images(sizes, batch, network.device()))
    else:
        keep_freed_memory()
        pair = network.images(sizes, batch, network.device())
        program = network.inference_program(VARIANT, precision)
        predict = torch.compile(program) if kind == "torch.compile" else program

        def run() -> network.Outputs:
            with torch.inference_mode():
                moved, disp = predict(*pair)
                return moved, disp

    torch.save([x.float().cpu() for x in run()], result)
    return run


def engine(kind: str, path: Path, images: list[Tensor]) -> Callable[[], network.Outputs]:
    """An exported file on images in the host's memory."""
    from ulae_rt.engines.backends import OnnxRuntimeBackend
    from ulae_rt.engines.backends.pt2 import Pt2Backend
    from ulae_rt.engines.backends.tensorrt import TensorRtBackend

    batch, _, *sizes = images[0].shape
    shapes = {"moving": 1, "fixed": 1, "moved": 1, "disp": 3}
    specs = [SimpleNamespace(name=k, shape=(batch, c, *sizes)) for k, c in shapes.items()]
    manifest: Any = SimpleNamespace(artefact=path.name, inputs=specs[:2], outputs=specs[2:])
    where = "cuda:0" if network.device() == "cuda" else "cpu"
    content = path.read_bytes()
    if kind == "pt2":
        backend: Any = Pt2Backend(content, manifest, where)
    elif kind == "onnxruntime":
        backend = OnnxRuntimeBackend(content, where, batch)
    else:
        backend = TensorRtBackend(content, kind, where)
    feeds = dict(zip(("moving", "fixed"), (image.numpy() for image in images), strict=True))

    def run() -> network.Outputs:
        found = backend.run(feeds)
        return torch.from_numpy(found["moved"]), torch.from_numpy(found["disp"])

    return run


def measured(names: tuple[str, ...], sizes: Sizes, batch: int, rounds: int) -> Measured:
    reasons = {RELEASED: "", **{name: left_out(name) for name in names}}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def start(name: str, file: Path) -> Child:
            path = artefact(name, sizes, batch, Path(folder))
            return stack.enter_context(
                child("suites.engines", name, sizes, batch, path and str(path), str(file))
            )

        found = network.outcomes(reasons, start, rounds, Path(folder))
    return Measured(found, flops=network.flops(VARIANT, sizes, batch))
