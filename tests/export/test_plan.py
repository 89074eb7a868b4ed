"""What one export makes, on which machine, and what it refuses before any work."""

import re
import tomllib
from pathlib import Path

import pytest

from ulae_rt.engines.machine import Gpu
from ulae_rt.errors import BackendUnavailable, UsageError
from ulae_rt.export import plan as module
from ulae_rt.export.config import ExportConfig, Missing
from ulae_rt.export.plan import Item, plan
from ulae_rt.manifest import ANY_BATCH


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    """A machine without a GPU, whose processor multiplies bf16, with every library."""
    monkeypatch.setattr(module, "gpus", lambda: ())
    monkeypatch.setattr(module, "processor", lambda: ("x86", frozenset({"amx_bf16"})))
    monkeypatch.setattr(Item, "missing", None)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "gpus", lambda: (Gpu("H200", 90),))


def names(**options):
    return [item.name for item in plan(ExportConfig(Path("w.safetensors"), **options)).items]


def test_a_laptop_gets_onnx_and_pt2():
    assert names() == [
        "ulae-net-fp32.onnx",
        "ulae-net-fp16.onnx",
        "ulae-net-fp32-cpu.pt2",
        "ulae-net-bf16-cpu.pt2",
    ]


def test_no_bf16_where_the_processor_has_none(monkeypatch):
    monkeypatch.setattr(module, "processor", lambda: ("x86", frozenset()))
    assert "ulae-net-bf16-cpu.pt2" not in names()


@pytest.mark.usefixtures("server")
def test_a_server_gets_engines_too_and_is_told_what_it_lacks(monkeypatch):
    lacking = Missing("sm90 cannot be built", "use the ONNX artefact")
    missing = property(lambda item: lacking if item.kind == "tensorrt-rtx" else None)
    monkeypatch.setattr(Item, "missing", missing)
    decided = plan(ExportConfig())
    assert [item.name for item in decided.items][4:] == [
        "ulae-net-fp16-trt-sm90.engine",
        "ulae-net-fp16-sm90.pt2",
    ]
    assert [(item.name, why) for item, why in decided.left_out] == [
        ("ulae-net-fp16-rtx-sm90.engine", lacking)
    ]


def test_names_say_precision_architecture_and_batch():
    assert names(
        formats=("tensorrt-rtx",), targets=("sm80", "sm120"), precisions=("fp16",), batches=(1, 4)
    ) == [
        "ulae-net-fp16-rtx-sm80.engine",
        "ulae-net-fp16-rtx-sm80-b4.engine",
        "ulae-net-fp16-rtx-sm120.engine",
        "ulae-net-fp16-rtx-sm120-b4.engine",
    ]
    assert names(formats=("onnx",), precisions=("fp32",), batches=(ANY_BATCH,)) == [
        "ulae-net-fp32-bN.onnx"
    ]
    assert names(formats=("tensorrt-rtx",), targets=("sm80",), compatibility="ampere-plus") == [
        "ulae-net-fp16-rtx-sm80-ampere-plus.engine"
    ]


def test_targets_belong_to_the_formats_that_have_one():
    assert names(formats=("onnx", "tensorrt-rtx", "pt2"), targets=("sm89", "cpu")) == [
        "ulae-net-fp32.onnx",
        "ulae-net-fp16.onnx",
        "ulae-net-fp16-rtx-sm89.engine",
        "ulae-net-fp16-sm89.pt2",
        "ulae-net-fp32-cpu.pt2",
        "ulae-net-bf16-cpu.pt2",
    ]


def test_one_precision_leaves_the_formats_that_have_it():
    assert names(precisions=("bf16",)) == ["ulae-net-bf16-cpu.pt2"]
    assert names(precisions=("fp16",)) == ["ulae-net-fp16.onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("sm89",)}, "--target needs --format"),
        ({"formats": ("tensorrt-rtx",)}, "needs a target"),
        ({"formats": ("tensorrt-rtx",), "targets": ("rtx4090",)}, "target is 'rtx4090'"),
        ({"formats": ("onnx",), "targets": ("sm89",)}, "target sm89 fits none"),
        ({"formats": ("onnx",), "precisions": ("bf16",)}, "onnx cannot be bf16"),
        ({"formats": ("pt2",), "precisions": ("fp16",)}, "pt2 for cpu cannot be fp16"),
        (
            {"formats": ("tensorrt-rtx",), "targets": ("sm89",), "batches": (ANY_BATCH,)},
            "one batch size an artefact",
        ),
        ({"precisions": ("fp16",), "batches": (0,)}, "batch is 0, expected 1 to 64"),
        ({"formats": ("plan",)}, "format is 'plan', expected one of onnx"),
        ({"tolerances": {"disp": 1.0}}, "tolerance is 'disp', expected one of disp_mean"),
        ({"tolerances": {"disp_max": -1.0}}, "tolerance disp_max is -1.0, expected 0 or more"),
        ({"compatibility": "all"}, "compatibility is 'all', expected one of none"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        plan(ExportConfig(Path("w.safetensors"), **options))


def test_a_named_format_that_cannot_be_made_is_an_error_and_not_left_out(monkeypatch):
    monkeypatch.setattr(Item, "missing", Missing("it is not installed", "pip install it"))
    with pytest.raises(BackendUnavailable, match=r"ulae-net-fp16-rtx-sm89\.engine: it is not"):
        plan(ExportConfig(formats=("tensorrt-rtx",), targets=("sm89",)))


@pytest.mark.follows(
    "e.g. --format tensorrt-rtx --target sm89",
    "leave out --batch dynamic, or take --precision fp32 or fp16",
    "leave it out, or add --format tensorrt-rtx --target sm80",
    "name the GPU's architecture: --target sm80, sm86, sm89 or sm120",
    "leave out --precision to get what pays in each format",
    "name the sizes: --batch 1 2 4 8",
)
@pytest.mark.parametrize(
    ("options", "hint", "followed"),
    [
        (
            {"targets": ("sm89",)},
            "--format tensorrt-rtx --target sm89",
            {"formats": ("tensorrt-rtx",), "targets": ("sm89",)},
        ),
        (
            {"precisions": ("bf16",), "batches": (ANY_BATCH,)},
            "leave out --batch dynamic, or take --precision fp32 or fp16",
            {"precisions": ("fp32", "fp16"), "batches": (ANY_BATCH,)},
        ),
        (
            {"precisions": ("bf16",), "batches": (ANY_BATCH,)},
            "leave out --batch dynamic",
            {"precisions": ("bf16",)},
        ),
        (
            {"compatibility": "ampere-plus"},
            "add --format tensorrt-rtx --target sm80",
            {"compatibility": "ampere-plus", "formats": ("tensorrt-rtx",), "targets": ("sm80",)},
        ),
        ({"compatibility": "same-capability"}, "leave it out", {}),
        ({"timing_cache": Path("cache")}, "leave it out", {}),
        (
            {"formats": ("tensorrt-rtx",)},
            "--target sm80, sm86, sm89 or sm120",
            {"formats": ("tensorrt-rtx",), "targets": ("sm80", "sm86", "sm89", "sm120")},
        ),
        ({"formats": ("onnx",), "precisions": ("bf16",)}, "--precision", {"formats": ("onnx",)}),
        ({"formats": ("plan",)}, "leave it out", {}),
        ({"formats": ("plan",)}, "or give one of them", {"formats": ("onnx",)}),
        ({"tolerances": {"disp_max": -1.0}}, "leave it out to have the standard one", {}),
        (
            {"formats": ("pt2",), "batches": (ANY_BATCH,)},
            "--batch 1 2 4 8",
            {"formats": ("pt2",), "batches": (1, 2, 4, 8)},
        ),
    ],
)
def test_hints_lead_to_a_plan(options, hint, followed):
    with pytest.raises(UsageError) as caught:
        plan(ExportConfig(Path("w.safetensors"), **options))
    assert hint in caught.value.hint
    assert names(**followed)


@pytest.mark.follows("leave it out, or add --format tensorrt on a machine with the GPU")
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("option", ["compatibility", "timing_cache"])
def test_hint_for_tensorrt_is_right_on_such_a_machine(option):
    value = {"compatibility": "same-capability", "timing_cache": Path("cache")}[option]
    assert names(formats=("tensorrt",), **{option: value})


def test_what_hints_install_is_what_the_project_names():
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    sources = [*root.glob("engines/**/*.py"), *root.glob("export/*.py")]
    sources += [root / "ulae_rt" / name for name in ("doctor.py", "registration/network.py")]
    text = "\n".join(path.read_text() for path in sources)
    extras = set(re.findall(r"ulae-rt\[(\w[\w-]*)\]", text))
    assert {"torch", "gpu"} <= extras <= project["optional-dependencies"].keys()
    required = set(re.findall(r"require\(\"[\w.]+\", \"([\w-]+)\"\)", text))
    assert {"torch", "export"} <= required <= project["optional-dependencies"].keys()
    assert any(each.startswith("onnxruntime>=") for each in project["dependencies"])


@pytest.mark.parametrize(
    ("asked", "left_out"),
    [
        ({"batches": (ANY_BATCH,)}, {"ulae-net-fp32-cpu-bN.pt2": "pt2 has one batch size"}),
        ({"precisions": ("bf16",)}, {"ulae-net-bf16.onnx": "onnx cannot be bf16"}),
    ],
)
def test_what_a_default_format_cannot_be_is_said(asked, left_out):
    decided = plan(ExportConfig(**asked))
    reasons = {item.name: missing.message for item, missing in decided.left_out}
    assert decided.items
    for name, words in left_out.items():
        assert reasons[name].startswith(words)
