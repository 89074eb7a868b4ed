"""The backend of ``.pt2`` files on the CPU."""

import contextlib
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from _support.engines import SHAPE, make_manifest, write_engine
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine
from ulae_rt.engines.backends.pt2 import Pt2Backend, _Captured
from ulae_rt.errors import BackendUnavailable, EngineMismatch
from ulae_rt.manifest import Manifest

ALONE = """
import sys
sys.modules["triton"] = None  # torch imports it where it is installed
import numpy as np
from types import SimpleNamespace
from pathlib import Path
from ulae_rt.engines.backends.pt2 import Pt2Backend
specs = [SimpleNamespace(name=name, shape=(1, 1, 4, 4, 4)) for name in ("moving", "fixed")]
manifest = SimpleNamespace(artefact="a.pt2", inputs=specs, outputs=specs)
backend = Pt2Backend(Path(sys.argv[1]).read_bytes(), manifest, "cpu")
image = np.ones((1, 1, 4, 4, 4), np.float32)
assert backend.run({"moving": image, "fixed": image})["moving"].sum() == 128
print([name for name in sys.modules if name.startswith(("ulae_rt.model", "ulae_rt.kernels"))])
"""


class Sum(torch.nn.Module):
    """In place of a network: moved = M + F, disp = three times M - F."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return moving + fixed, (moving - fixed).expand(-1, 3, -1, -1, -1).clone()


def program(path: Path, shape: tuple[int, ...] = SHAPE) -> bytes:
    example = torch.zeros(1, 1, *shape), torch.zeros(1, 1, *shape)
    torch.export.save(torch.export.export(Sum(), example), path)
    return path.read_bytes()


def manifest(content: bytes) -> Manifest:
    return dataclasses.replace(make_manifest(content, "sum.pt2"), kind="pt2", target="cpu")


def images() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {n: generator.random((1, 1, *SHAPE), dtype=np.float32) for n in ("moving", "fixed")}


def test_runs_a_program(tmp_path: Path) -> None:
    content = program(tmp_path / "sum.pt2")
    backend = Pt2Backend(content, manifest(content), "cpu")
    assert (backend.name, backend.device) == ("pt2", "cpu")
    assert backend.inputs == {"moving": (1, 1, *SHAPE), "fixed": (1, 1, *SHAPE)}
    feeds = images()
    found = backend.run(feeds)
    np.testing.assert_array_equal(found["moved"], feeds["moving"] + feeds["fixed"])
    assert found["disp"].shape == backend.outputs["disp"] == (1, 3, *SHAPE)
    kept = found["moved"].copy()
    backend.run(feeds)
    np.testing.assert_array_equal(found["moved"], kept)
    backend.close()
    backend.close()


def test_needs_no_model_and_no_triton(tmp_path: Path) -> None:
    program(tmp_path / "sum.pt2", (4, 4, 4))
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "sum.pt2")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.strip() == "[]", run.stderr


def test_refuses_what_is_no_program(tmp_path: Path) -> None:
    content = program(tmp_path / "sum.pt2")[:-200]
    with pytest.raises(EngineMismatch, match=r"loading sum\.pt2 with torch"):
        Pt2Backend(content, manifest(content), "cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="cuda:0 was asked for, and this torch sees no"):
        Pt2Backend(b"", manifest(b""), "cuda:0")


class FakeCuda:
    """What of torch.cuda a captured program uses, by the rules of CUDA graphs, on the CPU.

    Capturing computes nothing; a replay computes from what the inputs then hold, into the memory
    of the outputs that were captured.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> None:
        self.refuses, self.capturing, self.current, self.calls = refuses, None, None, []
        made = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: made(*a, **k))
        for name in ("Stream", "CUDAGraph", "device", "stream", "graph", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        return SimpleNamespace(device=device, synchronize=lambda: self.calls.append("synchronize"))

    def CUDAGraph(self):
        return SimpleNamespace(replay=self.replay)

    def device(self, name):
        return contextlib.nullcontext(name)

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph
        with self.stream(stream):
            yield
        self.capturing = None

    def program(self, *images):
        """Sums, as `Sum`; must run on the program's own stream."""
        assert self.current is not None
        self.calls.append("capture" if self.capturing else "run")
        outputs = [torch.full_like(images[0], torch.nan) for _ in range(2)]
        self.captured = images, outputs
        if not self.capturing:
            self.compute()
        return outputs

    def compute(self):
        (moving, fixed), outputs = self.captured
        outputs[0].copy_(moving + fixed)
        outputs[1].copy_(moving - fixed)

    def replay(self):
        assert self.current is not None
        self.calls.append("replay")
        self.compute()


@pytest.mark.parametrize("refuses", [False, True])
def test_a_program_of_fixed_sizes_is_captured_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    cuda = FakeCuda(monkeypatch, refuses)
    feeds = images()
    captured = _Captured(cuda.program, {n: x.shape for n, x in feeds.items()}, "cpu")
    moving, fixed = feeds.values()
    first = captured([moving, fixed])
    kept = first[0].copy()
    second = captured([fixed, fixed])
    np.testing.assert_array_equal(first[0], kept)  # not the memory of the next run
    np.testing.assert_array_equal(first[0], moving + fixed)
    np.testing.assert_array_equal(first[1], moving - fixed)
    np.testing.assert_array_equal(second[0], fixed + fixed)
    runs = ["run", "synchronize"] * 2 if refuses else ["replay", "synchronize"] * 2
    assert cuda.calls == ["run", "synchronize", *([] if refuses else ["capture"]), *runs]
    assert ("runs without a CUDA graph" in caplog.text) == refuses


@pytest.mark.follows("`ulae-rt doctor` says why; an ONNX engine runs on the CPU")
def test_hint_for_a_gpu_that_torch_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable) as caught:
        Pt2Backend(b"", manifest(b""), "cuda:0")
    assert caught.value.hint == "`ulae-rt doctor` says why; an ONNX engine runs on the CPU"
    assert run_command("doctor", []) == 0
    assert re.search("no  --device cuda +torch ", capsys.readouterr().out)
    assert load_engine(write_engine(tmp_path), device="cpu").backend == "onnxruntime"
