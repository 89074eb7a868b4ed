"""``ulae-rt doctor`` never fails, whatever is missing or broken, and says why."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from _support.brains import GEOMETRIES, save_brain
from _support.engines import measured, pretend_machine, write_engine
from _support.nets import small_weights
from _support.project import pyproject
from _support.tolerances import TOL, assert_close
from ulae_rt import doctor
from ulae_rt.cli import run_command
from ulae_rt.engines import machine
from ulae_rt.engines.machine import Gpu
from ulae_rt.kernels import _launch, warp
from ulae_rt.manifest import TOLERANCES

SHADOWED = ("onnx", "onnxruntime", "safetensors", "tensorrt", "tensorrt_rtx", "torch", "triton")


def doctor_with(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where the modules under ``path`` come before installed ones."""
    program = (
        f"import sys; sys.path.insert(0, {str(path)!r}); from ulae_rt.cli import main; "
        f"sys.exit(main(['doctor', *{list(arguments)!r}]))"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120
    )


def test_table_names_every_capability(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("doctor", []) == 0
    out = capsys.readouterr().out
    for name in ("Python", "memory", "GPU", "--backend torch", "Triton", "tensorrt-rtx", "weights"):
        assert name in out


def test_json_is_one_object_whose_refusals_have_a_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command("doctor", ["--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    rows = tables["this_machine"] + tables["what_can_run"]
    assert {row["name"] for row in rows} >= {"Python", "--device cuda", "export to ONNX", "train"}
    assert all(row["detail"] for row in rows)


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('wrong\\ndriver')",
        "import nothing_like_it",
        "raise OSError('no libcuda')",
    ],
    ids=["raises", "lacks-a-module", "lacks-a-library"],
)
def test_broken_libraries_are_rows_not_tracebacks(tmp_path: Path, source: str) -> None:
    for name in SHADOWED:
        (tmp_path / f"{name}.py").write_text(source)
    done = doctor_with(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["name"]: row for row in json.loads(done.stdout)["what_can_run"]}
    backends = [name for name in rows if name.startswith("--backend")]
    assert len(backends) == 5
    for name in [
        *backends,
        "export to tensorrt-rtx",
        "--device cuda",
        "Triton kernels",
        "export to ONNX",
        "train",
    ]:
        assert not rows[name]["ok"]
        assert "installed but" in rows[name]["detail"]
        assert "\n" not in rows[name]["detail"]
        assert rows[name]["hint"]


MODULE = ModuleType("library")
MODULE.__version__ = "9.1"  # type: ignore[attr-defined]
A_GPU = doctor.Check("--device cuda", True, "torch for CUDA")
NO_GPU = doctor.Check("--device cuda", False, "a build without CUDA", "install another")


def triton_row(
    monkeypatch: pytest.MonkeyPatch,
    *,
    triton: ModuleType | str = MODULE,
    torch: ModuleType | str = MODULE,
    cuda: doctor.Check = A_GPU,
    compiler: str | None = "/usr/bin/gcc",
    interprets: bool = False,
) -> doctor.Check:
    monkeypatch.setattr(doctor, "_load", {"triton": triton}.__getitem__)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: compiler)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interprets else "0")
    return doctor._triton(torch, cuda)


def test_kernels_are_usable_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    row = triton_row(monkeypatch)
    assert row == doctor.Check("Triton kernels", True, "triton 9.1: CUDA tensors take them")
    assert not triton_row(monkeypatch, compiler=None).ok
    monkeypatch.setenv("CC", "tcc")
    assert doctor._triton(MODULE, A_GPU).ok


@pytest.mark.parametrize(
    ("missing", "detail", "hint"),
    [
        ({"triton": "triton is not installed"}, "not installed; the reference", "ulae-rt[gpu]"),
        ({"torch": "torch is not installed"}, "not installed; the reference", "ulae-rt[gpu]"),
        ({"cuda": NO_GPU}, "9.1 but no CUDA device; the reference", "only for tests"),
        ({"interprets": True}, "9.1, which TRITON_INTERPRET=1", "unset TRITON_INTERPRET"),
        ({"compiler": None}, "9.1, but no C compiler", "install gcc"),
    ],
    ids=["no-triton", "no-torch", "no-gpu", "interpreter", "no-compiler"],
)
def test_kernels_that_cannot_be_used_say_why(
    missing: dict[str, Any], detail: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = triton_row(monkeypatch, **missing)
    assert not row.ok
    assert detail in row.detail
    assert hint in row.hint


H200 = Gpu("NVIDIA H200", 90)
BINDINGS = "cuda.bindings.runtime is not installed"


@pytest.mark.parametrize(
    ("kind", "gpus", "bindings", "runs", "builds"),
    [
        ("tensorrt", (), MODULE, "9.1, but no NVIDIA GPU", "it builds on the GPU it is for"),
        ("tensorrt", (H200,), BINDINGS, "but cuda-bindings is not installed", None),
        ("tensorrt", (H200, H200), MODULE, None, None),
        ("tensorrt-rtx", (), MODULE, "9.1, but no NVIDIA GPU", None),
        ("tensorrt-rtx", (H200,), MODULE, None, None),
    ],
)
def test_tensorrt_is_for_running_and_for_building(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    gpus: tuple[Gpu, ...],
    bindings: ModuleType | str,
    runs: str | None,
    builds: str | None,
) -> None:
    modules = {"tensorrt": MODULE, "tensorrt_rtx": MODULE, "cuda.bindings.runtime": bindings}
    monkeypatch.setattr(doctor, "_load", modules.__getitem__)
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    rows = {row.name: row for row in doctor._tensorrt(kind)}
    for name, reason in ((f"--backend {kind}", runs), (f"export to {kind}", builds)):
        row = rows[name]
        assert row.ok == (reason is None)
        assert (reason or "tensorrt") in row.detail
        assert row.ok or row.hint
        if gpus and row.ok and "without a GPU" not in row.detail:
            assert row.detail.endswith("9.1, for NVIDIA H200 (sm90)")


def test_bindings_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_load", lambda module: MODULE)
    assert doctor._bindings().detail == "9.1, through which TensorRT's engines run"
    monkeypatch.setattr(doctor, "_load", lambda module: f"{module} is not installed")
    row = doctor._bindings()
    assert (row.ok, row.detail) == (False, "cuda-bindings is not installed")
    assert "ulae-rt[tensorrt]" in row.hint


def test_programs_of_torch_are_those_of_its_minor_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (H200,))
    library = ModuleType("torch")
    library.__version__ = "2.13.0+cpu"  # type: ignore[attr-defined]
    row = doctor._pt2(library)
    assert row.detail == "files that torch 2.13 made, for the CPU and for NVIDIA H200 (sm90)"
    assert not doctor._pt2("torch is not installed").ok


@pytest.mark.parametrize(("version", "ok"), [("1.24.2", False), ("1.25.0", True), ("2.0", True)])
def test_cuda_of_an_old_onnxruntime_samples_no_volumes(
    monkeypatch: pytest.MonkeyPatch, version: str, ok: bool
) -> None:
    library = ModuleType("onnxruntime")
    library.__version__ = version  # type: ignore[attr-defined]
    library.get_available_providers = lambda: ["CUDAExecutionProvider"]  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor, "_load", lambda module: library)
    *_, row = doctor._onnxruntime()
    assert (row.name, row.ok) == ("--backend onnxruntime, CUDA", ok)
    assert ok or "samples volumes on the CPU only" in row.detail


def test_engines_of_a_folder_with_the_one_that_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_machine(monkeypatch)
    write_engine(tmp_path, precision="fp16", errors=(measured("this processor", 5.0),))
    write_engine(tmp_path, precision="fp32")
    write_engine(tmp_path, "ulae-net-fp32-trt-sm90", kind="tensorrt", target="sm90")
    (tmp_path / "ulae-net-fp16-trt-sm80.json").write_text("{}")
    assert run_command("doctor", ["--json", "--engine", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["engines"]
    assert [row["detail"] for row in rows[:2]] == ["chosen: 5 s a pair here", "not timed here"]
    assert [row["name"] for row in rows[:2]] == [f"ulae-net-fp{n}.onnx on cpu" for n in (16, 32)]
    assert "manifest format None" in rows[2]["detail"]
    assert "needs GPU 0, and this machine has none" in rows[3]["detail"]
    assert all(row["hint"] for row in rows[2:])
    assert run_command("doctor", ["--engine", str(tmp_path)]) == 0
    assert "ok  ulae-net-fp16.onnx on cpu" in capsys.readouterr().out


def test_folder_without_engines_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("doctor", ["--json", "--engine", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["engines"]
    assert not row["ok"]
    assert "holds no engine" in row["detail"]


def test_greetings_of_libraries_do_not_spoil_the_json(tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("print('welcome')\n__version__ = '99.0'")
    done = doctor_with(tmp_path, "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["what_can_run"]}
    assert not rows["--backend tensorrt"]["ok"]  # found, and of no use to this version
    assert "99.0" in rows["--backend tensorrt"]["detail"]


def test_no_cuda_context_is_made(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    program = (
        "import sys, torch; from ulae_rt.cli import main; main(['doctor']);"
        "sys.exit(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, timeout=120)
    assert done.returncode == 0


def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> list[doctor.Check]:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return doctor._gpus()


def test_gpus_are_listed_with_their_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = nvidia_smi(tmp_path, monkeypatch, "echo 'Some GPU, 81920, 9.0, 570.1'")
    assert rows == [doctor.Check("GPU", True, "Some GPU, 80 GiB, sm90, driver 570.1")]


def test_failing_driver_is_reported_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = nvidia_smi(tmp_path, monkeypatch, "echo 'Driver/library version mismatch'; exit 18")
    assert rows == [doctor.Check("GPU", False, "Driver/library version mismatch")]


def test_weights_are_described_by_their_own_header(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from ulae_rt.model import Metadata

    path = tmp_path / "w.safetensors"
    card = Metadata(shape=(80, 96, 80), spacing_mm=2.0, training_data="brains", licence="X")
    save_file({"a": torch.zeros(1)}, path, metadata={doctor.METADATA_KEY: card.to_json()})
    assert doctor._card(path) == ": paper, 80x96x80 at 2 mm, trained on brains, licence X"
    path.write_bytes(b"\0\1")
    assert "cannot be read" in doctor._card(path)


def test_metadata_is_where_the_checkpoint_module_puts_it() -> None:
    checkpoint = pytest.importorskip("ulae_rt.model.checkpoint")
    assert checkpoint.METADATA_KEY == doctor.METADATA_KEY


def test_engines_of_two_networks_are_a_row_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_engine(tmp_path)
    write_engine(tmp_path, precision="fp16", weights_sha256="1" * 64)
    assert run_command("doctor", ["--json", "--engine", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["engines"]
    assert not row["ok"]
    assert "holds engines of two networks, ulae-net-fp16.onnx and" in row["detail"]
    assert "name one file" in row["hint"]


def test_engine_of_a_looser_tolerance_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_machine(monkeypatch)
    write_engine(tmp_path, tolerance=replace(TOLERANCES["fp32"], disp_mean=1.0))
    assert run_command("doctor", ["--engine", str(tmp_path)]) == 0
    assert "verified with a looser tolerance: disp_mean 1 (0.0002)" in capsys.readouterr().out


@pytest.mark.follows("name a file with --weights")
def test_without_default_weights_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ulae_rt.model import checkpoint

    monkeypatch.setattr(doctor.ulae_rt, "__file__", str(tmp_path / "ulae_rt" / "__init__.py"))
    monkeypatch.setattr(checkpoint, "DEFAULT_WEIGHTS", tmp_path / "none.safetensors")
    assert doctor._weights().hint == "name a file with --weights"
    scan = str(save_brain(tmp_path / "s.nii.gz", *GEOMETRIES["RAS"]))
    line = ["-m", scan, "-f", scan, "-o", str(tmp_path / "o.nii.gz"), "--affine", "none"]
    assert run_command("register", line) == 1
    weights = small_weights(tmp_path / "w.safetensors")
    assert run_command("register", [*line, "--weights", str(weights), "--device", "cpu"]) == 0


@pytest.mark.follows("TRITON_INTERPRET=1 runs them on the CPU, only for tests")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton was loaded for a GPU")
def test_kernels_run_on_the_cpu_when_they_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    row = triton_row(monkeypatch, cuda=NO_GPU)
    assert row.hint == "TRITON_INTERPRET=1 runs them on the CPU, only for tests"
    monkeypatch.delenv("ULAE_RT_KERNELS", raising=False)
    image, disp = torch.rand(1, 1, 3, 4, 5), torch.full((1, 3, 3, 4, 5), 0.25)
    assert not _launch.uses_triton(image)
    expected = warp(image, disp)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _launch.uses_triton(image)
    assert_close("warped", warp(image, disp), expected, TOL["op float32"])


@pytest.mark.follows("unset TRITON_INTERPRET")
def test_kernels_are_usable_once_they_are_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_row(monkeypatch, interprets=True).hint == "unset TRITON_INTERPRET"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert doctor._triton(MODULE, A_GPU).ok


@pytest.mark.follows("install gcc, or set ULAE_RT_KERNELS=reference")
def test_without_a_compiler_there_is_one_to_install_or_the_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = triton_row(monkeypatch, compiler=None)
    assert row.hint == "install gcc, or set ULAE_RT_KERNELS=reference"
    monkeypatch.setattr(doctor.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    assert doctor._triton(MODULE, A_GPU).ok
    monkeypatch.setattr(_launch, "TRITON_INSTALLED", True)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setenv("ULAE_RT_KERNELS", "auto")
    assert _launch.uses_triton(on_gpu)
    monkeypatch.setenv("ULAE_RT_KERNELS", "reference")
    assert not _launch.uses_triton(on_gpu)


def cuda_row_of_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, version: str, providers: list[str], installed: set[str]
) -> doctor.Check:
    library = ModuleType("onnxruntime")
    library.__version__ = version  # type: ignore[attr-defined]
    library.get_available_providers = lambda: providers  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor, "_load", lambda module: library)
    monkeypatch.setattr(doctor, "_installed", installed.__contains__)
    *_, row = doctor._onnxruntime()
    return row


@pytest.mark.follows(
    "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu",
    "where there is a GPU: pip uninstall onnxruntime onnxruntime-gpu, then pip install",
    "pip install 'onnxruntime-gpu>=1.25'",
)
@pytest.mark.parametrize(
    ("version", "providers", "installed"),
    [
        ("1.25.0", ["CUDAExecutionProvider"], {"onnxruntime", "onnxruntime-gpu"}),
        ("1.25.0", ["CPUExecutionProvider"], {"onnxruntime"}),
        ("1.24.0", ["CUDAExecutionProvider"], {"onnxruntime-gpu"}),
    ],
    ids=["both", "the CPU's", "old"],
)
def test_what_pip_leaves_is_an_onnxruntime_with_cuda(
    monkeypatch: pytest.MonkeyPatch, version: str, providers: list[str], installed: set[str]
) -> None:
    row = cuda_row_of_onnxruntime(monkeypatch, version, providers, installed)
    assert not row.ok
    left = {*installed}
    for verb, names in re.findall(r"pip (install|uninstall) ([^,]+)", row.hint):
        packages = {re.match(r"[\w-]+", name.strip("'"))[0] for name in names.split()}
        left = left | packages if verb == "install" else left - packages
    assert left == {"onnxruntime-gpu"}
    assert cuda_row_of_onnxruntime(monkeypatch, "1.25.0", ["CUDAExecutionProvider"], left).ok


@pytest.mark.follows("pip install onnxruntime")
def test_onnxruntime_is_what_every_installation_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        (row,) = doctor._onnxruntime()
        assert row.hint == "pip install onnxruntime"
    assert any(each.startswith("onnxruntime>") for each in pyproject()["project"]["dependencies"])
    assert next(doctor._onnxruntime()).ok


@pytest.mark.follows("install a CUDA build of torch, then pip install 'ulae-rt[gpu]'")
def test_torch_with_cuda_is_a_row_that_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    row = doctor._cuda("torch is not installed")
    assert row.hint == "install a CUDA build of torch, then pip install 'ulae-rt[gpu]'"
    library: Any = ModuleType("torch")
    library.__version__, library.version = "2.13.0", SimpleNamespace(cuda="13.0")
    library.cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    assert (cuda := doctor._cuda(library)).ok
    assert triton_row(monkeypatch, torch=library, cuda=cuda).ok


@pytest.mark.follows("export on that machine, or here with --format tensorrt-rtx --target sm89")
def test_without_a_gpu_the_other_tensorrt_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_load", lambda module: MODULE)
        patch.setattr(machine, "gpus", lambda: ())
        _, row = doctor._tensorrt("tensorrt")
    assert row.hint.startswith("export on that machine, or here with --format tensorrt-rtx ")
    flags = row.hint.partition("here with ")[2].split()
    weights = small_weights(tmp_path / "w.safetensors")
    line = ["--weights", str(weights), "--out", str(tmp_path / "engine"), "--dry-run"]
    assert run_command("export", [*line, *flags]) == 0
    assert "sm89" in capsys.readouterr().out
