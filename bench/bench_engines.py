"""Everything that can run the exported network, each in a process of its own, in turn.

Against the released arithmetic in eager float32 as in bench_network. An engine's process opens a
file and nothing else. What this machine cannot build is left out and said.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_network as network
import pytest
import timing
import torch
from torch import Tensor

from _support import plain_ulae as plain
from _support.volumes import smooth_image
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.model import UlaeNet

RELEASED = network.RELEASED
CPU = ("torch fp32", "torch bf16", "pt2 fp32", "pt2 bf16", "onnxruntime fp32", "onnxruntime fp16")
GPU = ("torch fp16", "compiled fp16", "pt2 fp16", "onnxruntime fp16", "tensorrt fp16")
# Half precision with random, hence rough, weights: 0.3 voxel in the mean was measured.
HALF_TOLERANCE_VOXELS = 1.0
TYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
Outputs = tuple[Tensor, Tensor]


def on_gpu() -> bool:
    return network.device() == "cuda"


def left_out(name: str) -> str | None:
    """Why this machine cannot run a contender; None when it can."""
    kind, _, precision = name.partition(" ")
    bf16 = on_gpu() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and not bf16:
        return "this processor has no bf16 arithmetic"
    needs = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime")}
    needs["tensorrt"] = ("onnx", "onnxscript", "tensorrt")
    for library in needs.get(kind, ()):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    if kind == "onnxruntime" and on_gpu():
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime runs on the CPU only"
    return None


def network_of(precision: str) -> tuple[UlaeNet, plain.State]:
    """The package's network, on the CPU, and the same weights for the released arithmetic."""
    state = plain.scale_heads(plain.random_state("paper"), network.HEAD_SCALES)
    state = {key: value.float() for key, value in state.items()}
    net = UlaeNet("paper")
    net.load_state_dict(plain.package_state(state, "paper"))
    net.feature_dtype = TYPES[precision]
    return net.eval(), state


def artefact(name: str, sizes: tuple[int, int, int], batch: int, folder: Path) -> Path | None:
    """The file that a contender opens; None for those that run the model."""
    kind, _, precision = name.partition(" ")
    if kind not in ("pt2", "onnxruntime", "tensorrt"):
        return None
    net, _ = network_of("fp32")
    path = folder / f"{kind}-{precision}-{batch}"
    target = "cpu"
    if on_gpu():
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


def contender(
    name: str, sizes: tuple[int, int, int], batch: int, path: Path | None
) -> Callable[[], Outputs]:
    """Moved images and displacements of the same pairs, computed the contender's way."""
    images = [smooth_image(sizes, batch, seed=s, dtype=torch.float32) for s in (1, 2)]
    kind, _, precision = name.partition(" ")
    if path is not None:
        return engine(kind, path, images)
    images = [image.to(network.device()) for image in images]
    if name == RELEASED:
        return released(images)
    network.keep_freed_memory()
    net = network_of(precision)[0].to(network.device())
    predict = torch.compile(net.predict) if kind == "compiled" else net.predict

    def run() -> Outputs:
        with torch.inference_mode():
            return predict(*images)

    return run


def released(images: list[Tensor]) -> Callable[[], Outputs]:
    torch.backends.cudnn.allow_tf32 = False
    if on_gpu():
        network.baselines.use_released_norm()
    state = {key: value.to(network.device()) for key, value in network_of("fp32")[1].items()}

    def run() -> Outputs:
        with torch.inference_mode():
            out = plain.register(state, *images)
            return out.moved, out.disp

    return run


def engine(kind: str, path: Path, images: list[Tensor]) -> Callable[[], Outputs]:
    """Host to host, as a server calls it: on a GPU with both copies."""
    from ulae_rt.engines.backends import OnnxRuntimeBackend
    from ulae_rt.engines.backends.pt2 import Pt2Backend
    from ulae_rt.engines.backends.tensorrt import TensorRtBackend

    batch, _, *sizes = images[0].shape
    shapes = {"moving": 1, "fixed": 1, "moved": 1, "disp": 3}
    specs = [SimpleNamespace(name=k, shape=(batch, c, *sizes)) for k, c in shapes.items()]
    manifest: Any = SimpleNamespace(artefact=path.name, inputs=specs[:2], outputs=specs[2:])
    where = "cuda:0" if on_gpu() else "cpu"
    content = path.read_bytes()
    if kind == "pt2":
        backend: Any = Pt2Backend(content, manifest, where)
    elif kind == "onnxruntime":
        backend = OnnxRuntimeBackend(content, where, batch)
    else:
        backend = TensorRtBackend(content, kind, where)
    feeds = dict(zip(("moving", "fixed"), (image.numpy() for image in images), strict=True))

    def run() -> Outputs:
        found = backend.run(feeds)
        return torch.from_numpy(found["moved"]), torch.from_numpy(found["disp"])

    return run


def serve(
    name: str, sizes: tuple[int, int, int], batch: int, path: str | None, result: str
) -> None:
    """A contender's process: it opens, runs once and saves that, then runs once a line of stdin."""
    started = time.perf_counter()
    run = contender(name, sizes, batch, Path(path) if path else None)
    first = [x.float().cpu() for x in run()]
    print(time.perf_counter() - started, flush=True)
    torch.save(first, result)
    del first
    print("ready", flush=True)
    for _ in sys.stdin:
        timing.synchronise()
        started = time.perf_counter()
        run()
        timing.synchronise()
        print(time.perf_counter() - started, flush=True)
    print(network.peak_gb(), flush=True)
    print(torch.cuda.max_memory_allocated() / 1e9 if on_gpu() else 0.0, flush=True)


@contextmanager
def process(*arguments: Any) -> Iterator["subprocess.Popen[str]"]:
    script = (
        "import sys; sys.path[:0] = ['bench', 'tests']; import bench_engines;"
        f"bench_engines.serve{arguments!r}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=timing.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        yield child


def wrong(name: str, error: dict[str, float]) -> bool:
    """The gate: nothing is timed that is not right."""
    if name == RELEASED or name.endswith("fp32"):
        return error["disp_max"] > network.FP32_TOLERANCE_VOXELS
    return error["disp_mean"] > HALF_TOLERANCE_VOXELS


@pytest.mark.parametrize("batch", [1, 8] if torch.cuda.is_available() else [1])
def test_engines(
    batch: int, full: bool, rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = FULL_SHAPE if full else (32, 48, 32)
    reasons = {name: left_out(name) for name in (GPU if on_gpu() else CPU)}
    names = [RELEASED, *(name for name, reason in reasons.items() if reason is None)]
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        children = {}
        for number, name in enumerate(names):
            file = artefact(name, sizes, batch, tmp_path)
            result = tmp_path / f"{number}.pt"
            path = str(file) if file else None
            child = stack.enter_context(process(name, sizes, batch, path, str(result)))
            first = float(network.line(child))
            assert network.line(child) == "ready"
            found = torch.load(result, weights_only=True)
            if name == RELEASED:
                truth = found
            error = network.errors(*found, truth)
            assert not wrong(name, error), f"{name} is off: {error}"
            rows[name] = {"sizes": sizes, "batch": batch, "first": first, "error_voxels": error}
            children[name] = child
        seconds = timing.interleaved(
            {name: lambda child=child: network.ask(child) for name, child in children.items()},
            rounds,
        )
        for name, child in children.items():
            rows[name] |= {"seconds": seconds[name], "peak_gb": network.finish(child)}
            rows[name]["gpu_peak_gb"] = float(network.line(child))
    ratios = timing.ratios(seconds, RELEASED)
    for name, row in rows.items():
        row["ratio"] = ratios[name]
    if full:
        timing.record(f"engines-b{batch}", rows)
    with capsys.disabled():
        size = "x".join(map(str, sizes))
        print(f"\nengines, {batch} x {size}, {network.device()}, {rounds} rounds in turn")
        print(timing.table(seconds, RELEASED))
        for name, row in rows.items():
            off = row["error_voxels"]
            print(
                f"{name:<28}{row['peak_gb']:>8.2f} GB peak, {row['gpu_peak_gb']:.2f} GB of torch's "
                f"on the GPU; first result after {row['first']:.1f} s; off by "
                f"{off['disp_mean']:.1e} (mean), {off['disp_max']:.1e} (max) voxel"
            )
        for name, reason in reasons.items():
            if reason is not None:
                print(f"{name:<28}left out: {reason}")
