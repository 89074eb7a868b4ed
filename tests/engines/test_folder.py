"""Which engine of a folder runs: made for this machine, verified, and the fastest of those."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from _support import engines as support
from _support.engines import (
    SHAPE,
    edit,
    graph,
    images,
    make_manifest,
    measured,
    pretend_machine,
    write_engine,
)
from _support.nets import small_weights
from ulae_rt.cli import run_command
from ulae_rt.engines import load_engine, survey
from ulae_rt.engines.backends import open_backend
from ulae_rt.engines.machine import Gpu, gpus, machine_name
from ulae_rt.errors import BackendUnavailable, EngineMismatch, UsageError
from ulae_rt.manifest import ANY_BATCH, NOT_RUN, TOLERANCES, EngineMetadata, Manifest
from ulae_rt.registration.network import load_network

H200 = Gpu("NVIDIA H200", 90)
ADA = Gpu("NVIDIA L40S", 89)
AMX = frozenset({"amx_bf16", "avx512_bf16"})
TORCH = {"torch": "2.13.0"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engine"


@pytest.fixture
def libraries(monkeypatch):
    """All of them installed, in versions of their own."""
    modules = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}

    class Library:
        def __init__(self, version):
            self.__version__ = version

    monkeypatch.setattr(
        "ulae_rt.engines.machine.require", lambda module, extra: Library(modules[module])
    )
    monkeypatch.setattr("ulae_rt.engines.machine._torch_version", lambda: "2.13.0+cpu")
    monkeypatch.setattr(
        "onnxruntime.get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    return modules


def fill(folder):
    """One of each: ONNX, both TensorRTs, and .pt2 for the CPU and for a GPU."""
    for precision in ("fp32", "fp16"):
        write_engine(folder, precision=precision)
    for kind, version, sm in (("tensorrt", "11.4.0.106", 90), ("tensorrt-rtx", "1.7.1.116", 89)):
        versions = {kind.replace("-", "_"): version}
        write_engine(
            folder, f"ulae-net-fp16-{kind}", kind=kind, precision="fp16", target=f"sm{sm}",
            versions=versions,
        )  # fmt: skip
    for precision in ("fp32", "bf16"):
        write_engine(
            folder, f"ulae-net-{precision}-cpu", kind="pt2", precision=precision, target="cpu",
            versions=TORCH,
        )  # fmt: skip
    write_engine(
        folder, "ulae-net-fp16-sm90", kind="pt2", precision="fp16", target="sm90", versions=TORCH
    )


def order(folder, **options):
    """Stem and device of what can be used, the chosen first."""
    candidates = survey(folder, **options)
    usable = [candidate for candidate in candidates if candidate.refusal is None]
    assert [candidate.chosen for candidate in candidates] == [
        candidate is candidates[0] and bool(usable) for candidate in candidates
    ]
    return [(c.artefact.stem.removeprefix("ulae-net-"), c.device) for c in usable]


def test_rank_on_a_gpu(folder, libraries, monkeypatch):
    fill(folder)
    pretend_machine(monkeypatch, gpus=(H200,))
    assert order(folder) == [
        ("fp16-tensorrt", "cuda:0"),
        ("fp16-sm90", "cuda:0"),
        ("fp16", "cuda:0"),
        ("fp32", "cuda:0"),
        ("fp32-cpu", "cpu"),
        ("fp32", "cpu"),
        ("bf16-cpu", "cpu"),
        ("fp16", "cpu"),
    ]
    pretend_machine(monkeypatch, gpus=(ADA,))
    assert order(folder)[0] == ("fp16-tensorrt-rtx", "cuda:0")
    assert order(folder, precision="fp32")[0] == ("fp32", "cuda:0")
    assert order(folder, backend="pt2") == [("fp32-cpu", "cpu"), ("bf16-cpu", "cpu")]


def test_rank_on_a_processor(folder, libraries, monkeypatch):
    fill(folder)
    pretend_machine(monkeypatch)
    assert [name for name, _ in order(folder)] == ["fp32-cpu", "fp32", "bf16-cpu", "fp16"]
    pretend_machine(monkeypatch, flags=AMX)
    assert [name for name, _ in order(folder)] == ["bf16-cpu", "fp32-cpu", "fp32", "fp16"]
    assert [name for name, _ in order(folder, precision="fp32")] == ["fp32-cpu", "fp32"]


def test_seconds_measured_on_this_machine_come_before_the_rank(folder, monkeypatch):
    pretend_machine(monkeypatch)
    write_engine(folder, precision="fp32", errors=(measured("another", 0.1),))
    write_engine(
        folder, precision="fp16", errors=tuple(measured("this processor", s) for s in (9, 4, 5))
    )
    chosen = survey(folder)[0]
    assert (chosen.manifest.precision, chosen.seconds) == ("fp16", 4)
    for seconds, expected in ((3.0, ["fp32", "fp16"]), (7.0, ["fp16", "fp32"])):
        edit(folder / "ulae-net-fp32.json", errors=[vars(measured("this processor", seconds))])
        assert [name for name, _ in order(folder)] == expected


def test_engine_for_several_pairs_at_once_comes_last(folder, monkeypatch):
    pretend_machine(monkeypatch)
    fast = (measured("this processor", 0.4),)
    write_engine(folder, "ulae-net-fp32-b4", batch=4, errors=fast)
    write_engine(
        folder, "ulae-net-fp32-bN", batch=ANY_BATCH, errors=(measured("this processor", 9),)
    )
    candidates = survey(folder)
    assert [c.artefact.stem[-2:] for c in candidates] == ["bN", "b4"]
    assert candidates[1].seconds == 0.1  # of one pair
    assert load_engine(folder).run(*images()).moved.shape[0] == 1


def test_engine_that_was_never_run_is_opened_only_by_name(folder, caplog, monkeypatch):
    write_engine(folder, status=NOT_RUN, errors=())
    with pytest.raises(EngineMismatch, match="is built, not run, so nobody knows"):
        load_engine(folder)
    for path, backend in ((folder, "onnxruntime"), (folder / "ulae-net-fp32.onnx", "auto")):
        caplog.clear()
        load_engine(path, backend=backend)
        assert "is built, not run: nothing is known of its errors" in caplog.text
    write_engine(folder, precision="fp16")
    caplog.clear()
    assert load_engine(folder, backend="onnxruntime").manifest.precision == "fp16"
    assert not caplog.text


@pytest.mark.parametrize(
    ("gpu", "changes", "message"),
    [
        ((), {}, "needs GPU 0, and this machine has none"),
        ((Gpu("T4", 75),), {}, "was built for sm90, and T4 is sm75"),
        ((Gpu("T4", 75),), {"compatibility": "ampere-plus"}, "built for sm80 or later, and T4"),
        ((ADA,), {"compatibility": "same-capability"}, "was built for sm90, and NVIDIA L40S"),
        ((H200,), {"versions": {"tensorrt": "11.3.0.1"}}, "was built with tensorrt 11.3.0.1, and"),
        ((H200,), {"versions": {"tensorrt": "11.4.0.105"}}, "was built with tensorrt 11.4.0.105"),
        ((H200,), {"versions": {}}, "was built with tensorrt unknown, and tensorrt 11.4.0.106"),
        ((H200,), {"target": "h200"}, "target is .h200., expected a GPU such as sm89"),
    ],
)
def test_engine_of_another_machine_is_refused(
    folder, libraries, monkeypatch, gpu, changes, message
):
    fields = {"kind": "tensorrt", "target": "sm90", "versions": {"tensorrt": "11.4.0.106"}}
    write_engine(folder, **{**fields, **changes})
    pretend_machine(monkeypatch, gpus=gpu)
    monkeypatch.setattr("pathlib.Path.read_bytes", None)  # not opened
    with pytest.raises((BackendUnavailable, EngineMismatch), match=message) as caught:
        load_engine(folder)
    assert caught.value.hint


@pytest.mark.parametrize("compatibility", ["ampere-plus", "none"])
def test_plan_for_a_gpu_like_this_one_is_taken(folder, libraries, monkeypatch, compatibility):
    write_engine(
        folder, kind="tensorrt", target="sm90" if compatibility == "none" else "sm80",
        compatibility=compatibility, versions={"tensorrt": "11.4.0.106"},
    )  # fmt: skip
    pretend_machine(monkeypatch, gpus=(H200,))
    assert order(folder) == [("fp32", "cuda:0")]


def test_engine_for_the_gpu_is_not_for_the_cpu(folder, libraries, monkeypatch):
    fill(folder)
    pretend_machine(monkeypatch, gpus=(H200,))
    assert {device for _, device in order(folder, device="cpu")} == {"cpu"}
    with pytest.raises(BackendUnavailable, match=r"is for GPUs \(sm90\), and the device is the"):
        load_engine(folder / "ulae-net-fp16-tensorrt.engine", device="cpu")
    with pytest.raises(BackendUnavailable, match="was built for cpu, and NVIDIA H200"):
        load_engine(folder / "ulae-net-fp32-cpu.pt2", device="cuda")
    with pytest.raises(BackendUnavailable, match="needs GPU 1, and this machine has only 1"):
        load_engine(folder / "ulae-net-fp32.onnx", device="cuda:1")


def test_bytes_alone_are_opened_by_the_same_rules(tmp_path, libraries, monkeypatch):
    """The exporter verifies what it has not written yet."""
    pretend_machine(monkeypatch)
    content = graph()
    plan = make_manifest(content, "a.engine", kind="tensorrt", target="sm90")
    with pytest.raises(BackendUnavailable, match=r"a\.engine: needs GPU 0, and this machine has"):
        open_backend(plan, content)
    model = make_manifest(content, "a.onnx")
    with pytest.raises(EngineMismatch, match="backend tensorrt was asked for, and onnxruntime"):
        open_backend(model, content, backend="tensorrt")
    with pytest.raises(UsageError, match="backend is 'torch', expected one of auto"):
        open_backend(model, content, backend="torch")
    assert open_backend(model, content).device == "cpu"


@pytest.mark.follows("install the one that built it (pip install torch=={}), or {}")
def test_program_of_another_torch_is_refused(folder, libraries, monkeypatch):
    pretend_machine(monkeypatch)
    write_engine(folder, kind="pt2", target="cpu", versions={"torch": "2.13.1+cu130"})
    assert order(folder) == [("fp32", "cpu")]
    edit(folder / "ulae-net-fp32.json", versions={"torch": "2.14.0"})
    with pytest.raises(EngineMismatch, match=r"built with torch 2\.14\.0, and torch 2\.13\.0\+cpu"):
        load_engine(folder)
    # The package index has no torch 2.14.0+cu130, nor an unknown one.
    edit(folder / "ulae-net-fp32.json", versions={"torch": "2.14.0+cu130"})
    with pytest.raises(EngineMismatch) as caught:
        load_engine(folder)
    assert "(pip install torch==2.14.0)" in caught.value.hint
    with monkeypatch.context() as patch:  # the hint
        patch.setattr("ulae_rt.engines.machine._torch_version", lambda: "2.14.0+cpu")
        assert order(folder) == [("fp32", "cpu")]
    edit(folder / "ulae-net-fp32.json", versions={})
    with pytest.raises(EngineMismatch) as caught:
        load_engine(folder)
    assert "pip install" not in caught.value.hint


def test_missing_torch_is_one_sentence(folder, monkeypatch):
    write_engine(folder, kind="pt2", target="cpu", versions=TORCH)
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    with pytest.raises(BackendUnavailable, match=r"^torch is not installed$"):
        load_engine(folder)


def _not_installed(name):
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_what_fails_to_open_gives_way_to_the_next(folder, libraries, monkeypatch, caplog):
    fill(folder)
    pretend_machine(monkeypatch, gpus=(H200,))

    def fail(content, kind, device):
        raise BackendUnavailable(f"{kind} has no driver", "install one")

    monkeypatch.setattr("ulae_rt.engines.backends.TensorRtBackend", fail)
    monkeypatch.setattr("ulae_rt.engines.folder.devices_for", _first_device)
    monkeypatch.setattr("ulae_rt.engines.backends.Pt2Backend", _no_pt2)
    engine = load_engine(folder)
    assert (engine.backend, engine.device) == ("onnxruntime", "cpu")
    assert "fp16-tensorrt.engine: tensorrt has no driver; the next is tried" in caplog.text
    with pytest.raises(BackendUnavailable, match="tensorrt has no driver"):
        load_engine(folder, backend="tensorrt")


def _first_device(manifest: Manifest):
    return ("cuda:0",) if manifest.kind == "tensorrt" else ("cpu",)


def _no_pt2(content, manifest, device):
    raise BackendUnavailable("no pt2", "none")


def test_damaged_artefact_is_an_error_and_not_passed_over(folder, monkeypatch):
    for precision in ("fp32", "fp16"):
        write_engine(folder, precision=precision)
    (folder / "ulae-net-fp32.onnx").write_bytes(b"damaged")
    with pytest.raises(EngineMismatch, match=r"fp32\.onnx: SHA-256"):
        load_engine(folder)
    assert load_engine(folder, precision="fp16").manifest.precision == "fp16"


def test_foreign_files_are_left_out_and_said(folder, caplog):
    write_engine(folder)
    (folder / "notes.json").write_text("{}")
    (folder / "other.onnx").write_bytes(b"")
    newer = write_engine(folder, precision="fp16") / "ulae-net-fp16.json"
    edit(newer, format_version=4)
    (folder / "ulae-net-gone.json").write_text((folder / "ulae-net-fp32.json").read_text())
    with caplog.at_level(logging.WARNING):
        assert load_engine(folder).manifest.precision == "fp32"
    left_out = [record.message for record in caplog.records]
    assert len(left_out) == 3
    assert "other.json: no such manifest" in left_out[0]
    assert "manifest format 4, expected 3" in left_out[1]
    assert "ulae-net-gone.json: is the manifest of ulae-net-fp32.onnx" in left_out[2]


COARSE = EngineMetadata("paper", SHAPE, 2.0, "max", "none", "CC0")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"weights_sha256": "1" * 64}, "weights_sha256 is '000000000000' in one and '1111"),
        ({"metadata": COARSE}, r"spacing_mm is 1\.0 in one and 2\.0 in the other"),
        ({"metadata": replace(COARSE, spacing_mm=1.0, normalisation="p99.9")}, "normalisation is"),
        ({"metadata": replace(COARSE, spacing_mm=1.0, variant="release")}, "variant is 'paper'"),
    ],
)
def test_folder_of_two_networks_is_refused_unless_one_file_is_named(folder, changes, difference):
    """Otherwise the faster one decides what the images become."""
    write_engine(folder, precision="fp32")
    write_engine(folder, precision="fp16", **changes)
    for options in ({}, {"precision": "fp16"}, {"backend": "onnxruntime"}):
        for opened in (survey, load_engine):
            with pytest.raises(EngineMismatch, match="holds engines of two networks") as caught:
                opened(folder, **options)
    # In one order, whatever the file system's: fp16 before fp32.
    assert "ulae-net-fp16.onnx and ulae-net-fp32.onnx" in str(caught.value)
    one, other = re.search("(.*) is (.*) in one and (.*) in the other", str(caught.value)).group(
        2, 3
    )
    assert one != other
    assert load_engine(folder / "ulae-net-fp16.onnx").manifest.precision == "fp16"
    assert "name one file" in caught.value.hint
    assert run_command("doctor", ["--json", "--engine", str(folder)]) == 0


def test_folder_of_two_grids_is_refused(folder, monkeypatch):
    write_engine(folder)
    monkeypatch.setattr(support, "SHAPE", (8, 8, 8))
    write_engine(
        folder, precision="fp16", metadata=EngineMetadata("paper", (8, 8, 8), 1.0, "max", "", "")
    )
    with pytest.raises(EngineMismatch, match=r"shape is \(8, 8, 8\) in one and \(4, 6, 5\) in the"):
        load_engine(folder)


def test_hint_for_two_networks_is_followed(folder, tmp_path):
    write_engine(folder, precision="fp32")
    write_engine(folder, precision="fp16", weights_sha256="1" * 64)
    with pytest.raises(EngineMismatch) as caught:
        load_engine(folder)
    assert caught.value.hint == (
        "name one file to open it, or keep the engines of each network in a folder of their own"
    )
    own = tmp_path / "own"
    own.mkdir()
    for file in folder.glob("ulae-net-fp16.*"):
        file.rename(own / file.name)
    assert load_engine(own).manifest.precision == "fp16"
    assert load_engine(folder).manifest.precision == "fp32"


@pytest.mark.follows(
    "use --backend auto or {}",
    "ask for what is there, or export what is not; --backend and --precision auto",
)
def test_refusal_names_the_combination_and_what_is_there(folder, libraries, monkeypatch):
    fill(folder)
    pretend_machine(monkeypatch)
    with pytest.raises(EngineMismatch) as caught:
        load_engine(folder, backend="onnxruntime", precision="bf16")
    assert str(caught.value) == (
        f"{folder}: holds no engine of backend onnxruntime in bf16; it holds onnxruntime in fp16, "
        "fp32; pt2 in bf16, fp16, fp32; tensorrt in fp16; tensorrt-rtx in fp16"
    )
    with pytest.raises(EngineMismatch, match="no engine of backend tensorrt in fp32; it holds onn"):
        load_engine(folder, backend="tensorrt", precision="fp32")
    # The hint, followed.
    assert "--backend and --precision auto" in caught.value.hint
    assert load_engine(folder, backend="onnxruntime", precision="fp32")
    assert load_engine(folder, backend="onnxruntime")
    with pytest.raises(EngineMismatch, match=r"is opened by onnxruntime, not by backend tensorrt"):
        load_engine(folder / "ulae-net-fp32.onnx", backend="tensorrt")
    for backend in ("auto", "onnxruntime"):
        assert load_engine(folder / "ulae-net-fp32.onnx", backend=backend)


@pytest.mark.parametrize("device", [None, 3, b"cpu", ["cpu"]])
def test_device_that_is_none_is_wrong_usage(folder, device):
    write_engine(folder)
    with pytest.raises(UsageError, match=r"device is .*, expected auto, cpu, cuda or cuda:N") as e:
        load_engine(folder, device=device)
    assert "device='cpu'" in e.value.hint
    assert load_engine(folder, device="cpu").device == "cpu"


def test_device_of_torch_is_taken(folder):
    write_engine(folder)
    assert load_engine(folder, device=torch.device("cpu")).device == "cpu"
    with pytest.raises(BackendUnavailable, match="needs GPU 1"):
        load_engine(folder, device=torch.device("cuda:1"))


@pytest.mark.parametrize("name", ["backend", "precision"])
@pytest.mark.parametrize("value", [None, 3, ["fp32"], b"fp32"])
def test_choice_that_is_none_is_wrong_usage(folder, name, value):
    write_engine(folder)
    with pytest.raises(UsageError, match=f"{name} is .*, expected one of auto"):
        load_engine(folder, **{name: value})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "path is NoneType"),
        (3, "path is int '3'"),
        (b"a", "path is bytes"),
        ("", "path is ''"),
    ],
)
def test_path_that_is_none_is_wrong_usage(path, message):
    with pytest.raises(UsageError, match=f"{message}.*, expected a path"):
        load_engine(path)


def test_paths_that_lead_nowhere_are_one_sentence(folder, tmp_path):
    with pytest.raises(EngineMismatch, match="no such engine"):
        load_engine(tmp_path / "nowhere")
    with pytest.raises(EngineMismatch, match="File name too long"):
        load_engine(tmp_path / ("x" * 5000))
    weights = tmp_path / "best.PTH"
    weights.write_bytes(b"")
    with pytest.raises(
        EngineMismatch, match=r"best\.PTH: is no engine, expected a folder or a fil"
    ) as e:
        load_engine(weights)
    assert "--weights" in e.value.hint
    (tmp_path / "x.onnx").mkdir()
    with pytest.raises(EngineMismatch, match=r"x\.onnx: holds no engine"):
        load_engine(tmp_path / "x.onnx")
    link = tmp_path / "link.onnx"
    link.symlink_to(tmp_path / "gone.onnx")
    with pytest.raises(EngineMismatch, match=r"link\.onnx: a link to a file that is not there"):
        load_engine(link)


def test_artefact_that_is_a_folder_or_a_dangling_link_is_refused(folder):
    write_engine(folder)
    artefact = folder / "ulae-net-fp32.onnx"
    content = artefact.read_bytes()
    artefact.unlink()
    artefact.mkdir()
    with pytest.raises(EngineMismatch, match=r"fp32\.onnx: cannot be read .*it is a folder"):
        load_engine(folder)
    artefact.rmdir()
    artefact.symlink_to(folder / "gone")
    with pytest.raises(EngineMismatch, match=r"cannot be read .a link to a file that is not there"):
        load_engine(folder)
    (folder / "gone").write_bytes(content)
    assert load_engine(folder).manifest.precision == "fp32"


def test_folder_that_cannot_be_listed_is_one_sentence(folder, monkeypatch):
    write_engine(folder)

    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", forbidden)
    with pytest.raises(EngineMismatch, match=r"cannot be listed .Permission denied"):
        load_engine(folder)


def test_suffix_in_capitals_is_told_what_it_is(folder):
    write_engine(folder)
    renamed = (folder / "ulae-net-fp32.onnx").rename(folder / "ulae-net-fp32.ONNX")
    with pytest.raises(
        EngineMismatch, match=r"is the manifest of ulae-net-fp32\.onnx, expected"
    ) as e:
        load_engine(renamed)
    assert "keeps the name" in e.value.hint
    renamed.rename(folder / "ulae-net-fp32.onnx")  # the hint
    assert load_engine(folder)


def test_looser_tolerance_is_said_when_the_engine_is_opened(folder, caplog):
    write_engine(folder)
    load_engine(folder)
    assert not caplog.text
    loose = replace(TOLERANCES["fp32"], disp_max=0.5, sign_flips=1e5)
    write_engine(folder, tolerance=loose)
    load_engine(folder)
    assert (
        "ulae-net-fp32.onnx was verified with a looser tolerance than the standard of fp32: "
        "disp_max 0.5 (0.001), sign_flips 100000 (100)" in caplog.text
    )


def test_several_refusals_are_one_error(folder, libraries, monkeypatch):
    fill(folder)
    pretend_machine(monkeypatch, gpus=(Gpu("T4", 75),))
    with pytest.raises(UsageError, match="precision is 'int8', expected one of auto, fp32"):
        load_engine(folder, precision="int8")
    for name in ("fp32", "fp16", "fp32-cpu", "bf16-cpu"):
        for suffix in ("json", "onnx", "pt2"):
            (folder / f"ulae-net-{name}.{suffix}").unlink(missing_ok=True)
    with pytest.raises(BackendUnavailable, match="none of its engines can be used") as caught:
        load_engine(folder)
    for reason in ("sm90.pt2: was built", "tensorrt.engine: was built", "rtx.engine: was built"):
        assert reason in str(caught.value)
    assert caught.value.hint


def test_machine_is_asked_without_a_gpu_or_with(monkeypatch):
    gpus.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", _no_driver)
    assert gpus() == ()
    gpus.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert gpus() == (Gpu("GPU 0", 120), Gpu("GPU 1", 120))
    assert machine_name("cuda:1") == "GPU 1"
    gpus.cache_clear()
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)
    assert gpus() == ()
    gpus.cache_clear()


def _no_driver(name):
    raise OSError(f"{name}: cannot open shared object file")


class Driver:
    """libcuda.so.1 of a machine with two GPUs of compute capability 12.0."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 2
        return 0

    def cuDeviceGetName(self, name, size, index):
        name.value = f"GPU {index}".encode()
        return 0

    def cuDeviceGetAttribute(self, value, attribute, index):
        value._obj.value = {75: 12, 76: 0}[attribute]
        return 0


# Hints, followed


@pytest.mark.follows("give the folder that export wrote; weights are opened with load_network")
def test_hint_for_weights_given_as_an_engine(folder, tmp_path):
    weights = small_weights(tmp_path / "w.safetensors")
    with pytest.raises(EngineMismatch, match="is no engine, expected a folder") as caught:
        load_engine(weights)
    assert "weights are opened with load_network" in caught.value.hint
    assert load_network(weights, device="cpu").precision == "fp32"
    assert load_engine(write_engine(folder)).precision == "fp32"


@pytest.mark.follows("take another engine of the folder, or --device cuda on a machine with such a")
def test_hint_for_an_engine_of_a_gpu_on_the_cpu(folder, libraries, monkeypatch):
    fill(folder)
    pretend_machine(monkeypatch, gpus=(H200,))
    plan = folder / "ulae-net-fp16-tensorrt.engine"
    with pytest.raises(BackendUnavailable, match="is for GPUs") as caught:
        load_engine(plan, device="cpu")
    assert "take another engine of the folder, or --device cuda" in caught.value.hint
    assert load_engine(folder / "ulae-net-fp32.onnx", device="cpu").device == "cpu"
    assert order(plan, device="cuda") == [("fp16-tensorrt", "cuda:0")]


@pytest.mark.follows(
    "use an engine for the CPU (ONNX, or .pt2 for cpu); `ulae-rt doctor` lists the"
)
def test_hint_where_there_is_no_gpu(folder, libraries, monkeypatch, capsys):
    fill(folder)
    pretend_machine(monkeypatch)
    monkeypatch.setattr("ulae_rt.doctor.shutil.which", lambda program: None)
    for name in ("fp16-tensorrt.engine", "fp32.onnx"):
        with pytest.raises(BackendUnavailable, match="needs GPU 0, and this machine") as caught:
            load_engine(folder / f"ulae-net-{name}", device="cuda")
        assert "`ulae-rt doctor` lists the GPUs" in caught.value.hint
    assert run_command("doctor", ["--engine", str(folder)]) == 0
    said = capsys.readouterr().out
    assert re.search("no  GPU +none found", said)
    assert re.search(r"ok  ulae-net-fp32-cpu\.pt2 on cpu", said)
    assert load_engine(folder / "ulae-net-fp32.onnx", device="cpu").device == "cpu"
