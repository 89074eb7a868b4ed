"""``.pt2`` files: what is in them, and that torch alone runs them."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from _support.nets import SHAPE, small_net
from _support.project import ROOT
from _support.tolerances import TOL, assert_close
from _support.volumes import smooth_image
from ulae_rt.export import pt2

# What a GPU's compiler is given, traced on the CPU: the kernels' launches, and nothing opaque.
TRACE = """
import json, logging, torch
from collections import Counter
from ulae_rt.kernels import _launch
_launch.uses_triton = lambda tensor: True
from torch._functorch.aot_autograd import aot_export_module
from _support.nets import SHAPE, small_net
from ulae_rt.export import pt2
from ulae_rt.export._launches import traceable
program = pt2.trace_for_gpu(small_net(), SHAPE, precision="fp16", batch=1, device="cpu")
images = [torch.zeros(1, 1, *SHAPE) for _ in range(2)]
with torch.no_grad(), traceable():
    graph = aot_export_module(program.module(), images, trace_joint=False, decompositions={})[0]
print(json.dumps(Counter(str(node.target) for node in graph.graph.nodes)))
"""


def pair(batch: int = 1) -> list[torch.Tensor]:
    return [smooth_image(SHAPE, batch, seed=s, dtype=torch.float32) for s in (1, 2)]


@pytest.mark.parametrize(
    ("precision", "batch", "types"),
    [
        ("fp32", 2, {"convolution float32": 71}),
        # The coarse heads stay wide.
        ("bf16", 1, {"convolution bfloat16": 69, "convolution float32": 2}),
    ],
)
def test_a_program_predicts_as_the_network_does(
    precision: str, batch: int, types: dict[str, int]
) -> None:
    net = small_net()
    built = pt2.build(net, SHAPE, precision=precision, batch=batch, target="cpu")
    assert built.types == types
    assert built.versions == {"torch": torch.__version__}
    program = torch.export.load(io.BytesIO(built.content)).module()
    net.feature_dtype = {"fp32": None, "bf16": torch.bfloat16}[precision]
    with torch.inference_mode():
        found, expected = program(*pair(batch)), net.predict(*pair(batch))
    # The folded weights are rounded once in place of a few times, and in bf16 to other neighbours.
    tol = TOL["network float32 exported" if precision == "fp32" else "network bfloat16"]
    assert_close("disp", found[1], expected.disp, tol)
    assert_close("moved", found[0], expected.moved, tol)


def test_the_same_bytes_each_time_and_the_model_as_it_was() -> None:
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    first, second = (
        pt2.build(net, SHAPE, precision="bf16", batch=1, target="cpu").content for _ in range(2)
    )
    assert first == second
    with zipfile.ZipFile(io.BytesIO(first)) as parts:
        everything = b"".join(parts.read(name) for name in parts.namelist())
    assert b".py" not in everything  # no paths of the exporting machine
    assert len(first) < 2e6
    assert net.feature_dtype is None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_program_does_not_depend_on_this_machines_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes() -> list[str]:
        program = pt2.trace_for_cpu(small_net(), SHAPE, precision="fp32", batch=1)
        return [str(node.target) for node in program.graph.nodes]

    one = nodes()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert nodes() == one


@pytest.mark.follows("export on a machine with a GPU of {}; --target cpu and ONNX need none")
def test_what_a_gpu_is_compiled_for_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pt2.missing("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lacking = pt2.missing("sm90")
    assert lacking is not None
    assert lacking.message == "AOTInductor builds on the GPU that it builds for, and there is none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    lacking = pt2.missing("sm90")
    assert lacking is not None
    assert lacking.message == "this machine's GPU is sm89, and sm90 was asked for"
    assert pt2.missing("sm89") is None
    assert lacking.hint == "export on a machine with a GPU of sm90; --target cpu and ONNX need none"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))  # the hint
    assert pt2.missing("sm90") is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_a_gpu_gets_kernels_and_no_operators() -> None:
    """That they compile and run is for a machine with a GPU to show."""
    run = subprocess.run(
        [sys.executable, "-c", TRACE],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    nodes = json.loads(run.stdout)
    # 31 normalisations of three kernels, nine upsamplings, resize, 2 warps, warp_compose, compose.
    assert nodes["triton_kernel_wrapper_functional"] == 31 * 3 + 9 + 5
    foreign = ("ulae_rt", "grid_sampler", "upsample", "group_norm")
    assert not [name for name in nodes if any(word in name for word in foreign)]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_package_for_this_gpu_predicts_as_the_network_does(
    precision: str, tmp_path: Path
) -> None:
    net = small_net()
    major, minor = torch.cuda.get_device_capability()
    built = pt2.build(net, SHAPE, precision=precision, batch=1, target=f"sm{major}{minor}")
    (tmp_path / "net.pt2").write_bytes(built.content)
    program = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    net = net.cuda()
    net.feature_dtype = pt2._FEATURES[precision]
    images = [x.cuda() for x in pair()]
    with torch.inference_mode():
        found, expected = program(*images), net.predict(*images)
    tol = TOL["network float32" if precision == "fp32" else "network bfloat16"]
    assert_close("disp", found[1], expected.disp, tol)
    assert_close("moved", found[0], expected.moved, tol)
