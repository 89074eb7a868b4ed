"""The backend of ``.pt2`` files on the CPU."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.engines import SHAPE, make_manifest, write_engine
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine
from ulae_rt.engines.backends.pt2 import Pt2Backend, _Uncaptured
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


@pytest.mark.parametrize("wanted", [["disp"], ["moved"], ["disp", "moved"]])
def test_only_what_is_wanted_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[str]
) -> None:
    content = program(tmp_path / "sum.pt2")
    backend = Pt2Backend(content, manifest(content), "cpu")
    feeds = images()
    everything = backend.run(feeds)
    results = backend.run(feeds, wanted)
    assert list(results) == wanted
    for name, array in results.items():
        np.testing.assert_array_equal(array, everything[name])
    reduced = list(backend._program._reduced.values())[-1]
    targets = [str(node.target) for node in reduced.graph.nodes]
    assert any("add" in target for target in targets) == ("moved" in wanted)
    assert any("sub" in target for target in targets) == ("disp" in wanted)


def test_a_program_of_any_batch_is_given_a_gpus_tensors_as_they_are() -> None:
    """Its stand-in takes those of the CPU, and what it gives is torch's, made for inference."""
    seen = []

    def compiled(*images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append([image.data_ptr() for image in images])
        return images[0] + images[1], images[0] - images[1]

    pair = torch.rand(2, 3, 1, *SHAPE)
    program = _Uncaptured(compiled, "cuda:0")
    (difference,) = program([*pair], [1])
    assert seen == [[image.data_ptr() for image in pair]]
    assert torch.equal(difference, pair[0] - pair[1])
    assert not difference.is_inference()  # so it may be used where gradients are computed


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
