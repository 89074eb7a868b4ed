"""Weights files: what is written is read back, what is foreign or damaged is refused by name."""

import json
import os
import pickle
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from _support import plain_ulae as plain
from _support.engines import write_engine
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import smooth_image
from ulae_rt.cli import main
from ulae_rt.engines import load_engine
from ulae_rt.errors import BackendUnavailable, CheckpointError, OutputError, UsageError
from ulae_rt.model import Metadata, UlaeNet, load_model, save_checkpoint
from ulae_rt.model.checkpoint import DEFAULT_WEIGHTS, read_torch

SIZES = (16, 32, 16)


@pytest.fixture
def released() -> plain.State:
    """What the released code saves, in float32."""
    return {k: v.float() for k, v in plain.random_state("release").items()}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A small checkpoint of this project's."""
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, UlaeNet(channels=4), Metadata(channels=4))
    return path


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return smooth_image(SIZES, seed=1, dtype=dtype), smooth_image(SIZES, seed=2, dtype=dtype)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """``path`` with its tensors changed and its metadata kept."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


# Own files


@pytest.mark.parametrize(
    "arguments",
    [
        {"variant": "paper"},
        {"variant": "release"},
        {"variant": "release", "accumulate": False},
        {"variant": "paper", "uncoupled": False},
    ],
    ids=["paper", "release", "one-pass", "coupled"],
)
def test_round_trip(tmp_path: Path, arguments: dict[str, Any]) -> None:
    metadata = Metadata(
        **arguments,
        channels=4,
        shape=(80, 96, 80),
        spacing_mm=2.0,
        normalisation="max",
        training_data="nobody's brains",
        licence="CC0-1.0",
        recipe={"steps": 3, "windows": [7, 5], "lambda": 0.3},
        versions={"ulae_rt": "0.0", "torch": "2.6"},
    )
    model = UlaeNet(channels=4, **arguments)
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model, metadata)
    loaded = load_model(path)
    assert loaded.metadata == metadata
    assert not loaded.training
    assert loaded.feature_dtype is None
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert_equal(key, loaded.state_dict()[key], value)
    with torch.no_grad():
        assert_equal("disp", loaded.predict(*pair()).disp, model.eval().predict(*pair()).disp)


def test_paths_may_be_strings(own: Path) -> None:
    assert load_model(str(own)).channels == 4


def test_own_torch_file(tmp_path: Path) -> None:
    """Tensors and metadata in a ``.pt``; whatever else it holds does not matter."""
    model = UlaeNet("release", channels=4)
    metadata = Metadata("release", 4, licence="CC0-1.0")
    content = {"model": model.state_dict(), "ulae_rt": metadata.to_json(), "step": 7}
    loaded = load_model(saved(content, tmp_path / "last.pt"))
    assert loaded.metadata == metadata
    for key, value in model.state_dict().items():
        assert_equal(key, loaded.state_dict()[key], value)


def test_memory_layout_of_the_model_does_not_reach_the_file(tmp_path: Path) -> None:
    model = UlaeNet(channels=4)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(paths[0], model, model.metadata)
    save_checkpoint(paths[1], model.to(memory_format=torch.contiguous_format), model.metadata)
    assert paths[0].read_bytes() == paths[1].read_bytes()


# Released files


def test_released_file_gives_the_plain_result(tmp_path: Path, released: plain.State) -> None:
    model = load_model(saved(released, tmp_path / "released.pth")).double()
    moving, fixed = pair(torch.float64)
    with torch.no_grad():
        truth = plain.register({k: v.double() for k, v in released.items()}, moving, fixed)
        assert_close("Phi", model.predict(moving, fixed).disp, truth.disp, TOL["network float64"])
    assert float(truth.disp.abs().max()) > 1


@pytest.mark.parametrize("form", ["state_dict", "model", "module", "grids"])
def test_forms_of_released_files(tmp_path: Path, released: plain.State, form: str) -> None:
    expected = load_model(saved(released, tmp_path / "bare.pth")).state_dict()
    content: dict[str, Any] = dict(released)
    if form == "module":
        content = {f"module.{key}": value for key, value in content.items()}
    elif form == "grids":
        grid = torch.zeros(1, 3, 4, 4, 4)
        content |= {"transform.grid": grid, "acc2.warp.grid": grid, "grid": grid}
    else:
        content = {form: content, "epoch": 160_000}
    model = load_model(saved(content, tmp_path / "released.pth"))
    assert (model.metadata.variant, model.metadata.channels) == ("release", 16)
    assert model.metadata.licence == ""  # not ours to say
    for key, value in model.state_dict().items():
        assert_equal(key, value, expected[key])


def test_papers_decoder_repeated_in_a_released_file(tmp_path: Path) -> None:
    state = {k: v.float() for k, v in plain.random_state("paper").items()}
    model = load_model(saved(state, tmp_path / "repeated.pth"))
    assert model.variant == "release"
    one, three = model.decoders["1"].state_dict(), model.decoders["3"].state_dict()
    for key, value in one.items():
        assert_equal(key, value, three[key])


def test_differing_encoder_copies(tmp_path: Path, released: plain.State) -> None:
    changed = released["acc2.mec3.ab6.weight"].clone()
    changed[0, 0, 0, 0, 0] += 1e-3
    released["acc2.mec3.ab6.weight"] = changed
    with pytest.raises(CheckpointError, match=r"acc2\.mec3\.ab6\.weight differs .* earlier step"):
        load_model(saved(released, tmp_path / "x.pth"))


def test_missing_key(tmp_path: Path, released: plain.State) -> None:
    del released["acc2.dc2.0.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing key.*decoders\.2\.dc2\.0\.weight"):
        load_model(saved(released, tmp_path / "x.pth"))


def test_extra_key(tmp_path: Path, released: plain.State) -> None:
    released["acc1.dc3.0.weight"] = torch.zeros(32, 48, 3, 3, 3)
    with pytest.raises(CheckpointError, match=r"1 unknown key.*decoders\.1\.dc3\.0\.weight"):
        load_model(saved(released, tmp_path / "x.pth"))


def test_foreign_key(tmp_path: Path, released: plain.State) -> None:
    released["unet.enc.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"unknown key 'unet\.enc\.weight', expected keys ac"):
        load_model(saved(released, tmp_path / "x.pth"))


def test_misshapen_key(tmp_path: Path, released: plain.State) -> None:
    released["acc3.output.weight"] = torch.zeros(3, 16, 1, 1, 1)
    with pytest.raises(
        CheckpointError, match=r"heads\.3\.weight has shape \(3, 16, 1, 1, 1\), expected \(3, 16, 3"
    ):
        load_model(saved(released, tmp_path / "x.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, released: plain.State, value: float) -> None:
    released["acc1.output.bias"] = torch.tensor([0.0, value, 0.0])
    with pytest.raises(CheckpointError, match=r"heads\.1\.bias holds NaN or Inf"):
        load_model(saved(released, tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], "expected a dictionary of tensors, got list"),
        (torch.zeros(3), "expected a dictionary of tensors, got Tensor"),
        ({"weights": [1, 2]}, r"entry 'weights' is list '\[1, 2\]', expected a name and a tensor"),
        ({"state_dict": {"epoch": 3}}, "entry 'epoch' is int '3', expected a name and a tensor"),
        ({}, r"no layer of ULAE-net, expected keys acc1"),
        ({"grid": torch.zeros(3)}, r"no layer of ULAE-net, expected keys acc1"),
        ({"ulae_rt": Metadata().to_json()}, r"\d+ missing key"),
        ({"ulae_rt": "{}", "model": {}}, "its metadata cannot be read"),
    ],
    ids=["list", "tensor", "no-tensors", "nested", "empty", "grid-only", "no-model", "no-metadata"],
)
def test_torch_files_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(saved(content, tmp_path / "x.pth"))


# Numbers that are no weights


def odd_tensors() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "of type int32": lambda v: (v * 100).int(),
        "of type bool": lambda v: v > 0,
        "of type complex64": lambda v: v.to(torch.complex64),
        "of type float8_e4m3fn": lambda v: v.to(torch.float8_e4m3fn),
        r"sparse \(sparse_coo\)": lambda v: v.to_sparse(),
        r"quantised \(torch.qint8\)": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        "on the meta device": lambda v: v.to("meta"),
    }


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("what", sorted(odd_tensors()))
@pytest.mark.parametrize("own_file", [False, True], ids=["released", "own"])
def test_tensors_that_are_no_weights_are_refused_by_name(
    tmp_path: Path, released: plain.State, what: str, own_file: bool
) -> None:
    if own_file:
        model = UlaeNet(channels=4)
        state, key = dict(model.state_dict()), "heads.2.weight"
        content: Any = {"model": state, "ulae_rt": model.metadata.to_json()}
    else:
        content, state, key = released, released, "acc2.mec3.ab6.weight"
    state[key] = odd_tensors()[what](state[key])
    path = saved(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"{key} is {what}.*, expected a dense") as e:
        load_model(path)
    assert "float()" in e.value.hint


@pytest.mark.follows("save the weights as they were trained, model.float().state_dict()")
def test_hint_for_such_tensors_leads_to_weights(tmp_path: Path) -> None:
    net = UlaeNet("release", channels=4)
    state = {k: v.int() for k, v in net.state_dict().items()}
    content = {"model": state, "ulae_rt": net.metadata.to_json()}
    with pytest.raises(CheckpointError, match="of type int32"):
        load_model(saved(content, tmp_path / "x.pt"))
    content["model"] = net.float().state_dict()
    assert load_model(saved(content, tmp_path / "x.pt")).channels == 4


def test_values_that_float32_cannot_hold(tmp_path: Path, released: plain.State) -> None:
    wide = {k: v.double() for k, v in released.items()}
    path = saved(wide, tmp_path / "x.pth")
    assert load_model(path).heads["1"].weight.dtype == torch.float32
    wide["acc1.output.bias"][0] = 1e300
    with pytest.raises(CheckpointError, match=r"heads\.1\.bias holds values beyond 3\.4e\+38"):
        load_model(saved(wide, path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_widened(own: Path, dtype: torch.dtype) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    assert {p.dtype for p in load_model(rewritten(own, narrow)).parameters()} == {torch.float32}


# Wrapped and renamed files


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "model._orig_mod.", "module._orig_mod."]
)
def test_prefixes_of_wrappers_are_dropped(
    own: Path, tmp_path: Path, released: plain.State, prefix: str
) -> None:
    expected = load_model(own).state_dict()

    def wrap(tensors: dict[str, Tensor]) -> None:
        content = {f"{prefix}{key}": value for key, value in tensors.items()}
        tensors.clear()
        tensors.update(content)

    for key, value in load_model(rewritten(own, wrap)).state_dict().items():
        assert_equal(key, value, expected[key])
    wrap(released)
    lightning = {"state_dict": released, "epoch": 3, "pytorch-lightning_version": "2.5"}
    assert load_model(saved(lightning, tmp_path / "last.ckpt")).variant == "release"


def test_prefix_that_not_all_share_is_named(tmp_path: Path, released: plain.State) -> None:
    state = {f"model.{key}": value for key, value in released.items()}
    state["loss.kernel"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"of its \d+ keys have the prefix 'model\.'"):
        load_model(saved(state, tmp_path / "x.ckpt"))


def test_two_state_dicts_are_not_chosen_from(tmp_path: Path, released: plain.State) -> None:
    content = {"state_dict": released, "model": {k: v + 1 for k, v in released.items()}}
    with pytest.raises(CheckpointError, match="several state dicts, 'state_dict' and 'model'"):
        load_model(saved(content, tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.PTH", "x.Pt", "x.pth.tar", "x.safetensors"])
def test_torch_files_by_any_name(tmp_path: Path, released: plain.State, name: str) -> None:
    assert load_model(saved(released, tmp_path / name)).variant == "release"


@pytest.mark.parametrize("name", ["x.SAFETENSORS", "x.bin", "x.pt", "x.pth"])
def test_safetensors_by_any_name(own: Path, name: str) -> None:
    assert load_model(own.rename(own.with_name(name))).channels == 4


def test_names_that_are_no_strings(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"entry 3 is Tensor .*, expected a name and a tensor"
    ):
        load_model(saved({3: torch.zeros(1)}, tmp_path / "x.pth"))


# Hints, followed


@pytest.mark.follows("write it with ulae_rt.model.save_checkpoint(path, model, metadata)")
def test_hint_for_a_bare_state_dict_of_this_project(tmp_path: Path) -> None:
    """It was to be saved so, by a hint that led to the next refusal."""
    model = UlaeNet(channels=4)
    for path in (
        saved(model.state_dict(), tmp_path / "x.pth"),
        saved(dict(UlaeNet("release", 4).state_dict()), tmp_path / "y.pt"),
        tmp_path / "z.safetensors",
    ):
        if path.suffix == ".safetensors":
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            path.write_bytes(safetensors.torch.save(state))
        with pytest.raises(
            CheckpointError, match="a bare state dict of this project's ne"
        ) as caught:
            load_model(path)
        assert "ulae_rt.model.save_checkpoint(path, model, metadata)" in caught.value.hint
    save_checkpoint(tmp_path / "x.pth", model, Metadata(channels=4))
    assert load_model(tmp_path / "x.pth").channels == 4


@pytest.mark.follows("save the tensors alone: of the released code's network give what torch.save")
def test_hint_for_a_pickled_network(tmp_path: Path, released: plain.State) -> None:
    model = UlaeNet("release", 4)
    path = saved(model, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="could run code") as caught:
        load_model(path)
    assert "torch.save(model.state_dict(), path)" in caught.value.hint
    torch.save(released, path)  # the state dict of the released code's network
    assert load_model(path).variant == "release"
    save_checkpoint(path, model, model.metadata)  # this project's
    assert load_model(path).channels == 4


@pytest.mark.follows(
    "of the released code's network give what torch.save(model.state_dict(), path) writes, of this "
    "project's what ulae_rt.model.save_checkpoint(path, model, metadata) writes"
)
@pytest.mark.parametrize("wrong", ["list", "two", "entry", "no channels"])
def test_hint_for_a_file_of_something_else(
    tmp_path: Path, released: plain.State, wrong: str
) -> None:
    nothing = {key: value[:0] for key, value in released.items()}
    content = {
        "list": [1, 2], "two": {"state_dict": released, "model": released},
        "entry": {**released, "epoch": 3}, "no channels": nothing,
    }  # fmt: skip
    path = saved(content[wrong], tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert caught.value.hint.startswith("of the released code's network give what torch.save(")
    torch.save(released, path)
    assert load_model(path).variant == "release"
    model = UlaeNet("release", 4)
    save_checkpoint(path, model, model.metadata)
    assert load_model(path).channels == 4


@pytest.mark.follows("give a file that `ulae-rt train` or ulae_rt.model.save_checkpoint wrote")
def test_hint_for_tensors_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="holds no 'ulae_rt' metadata") as caught:
        load_model(path)
    assert "ulae_rt.model.save_checkpoint wrote" in caught.value.hint
    save_checkpoint(path, UlaeNet(channels=4), Metadata(channels=4))
    assert load_model(path).channels == 4


@pytest.mark.follows("open it with load_engine, or --engine")
def test_hint_for_an_engine_given_as_weights(tmp_path: Path) -> None:
    path = write_engine(tmp_path) / "ulae-net-fp32.onnx"
    with pytest.raises(CheckpointError, match=r"got '\.onnx', which is an engine") as caught:
        load_model(path)
    assert caught.value.hint == "open it with load_engine, or --engine"
    assert load_engine(path, device="cpu").precision == "fp32"


@pytest.mark.follows("use --device cpu, or run `ulae-rt doctor` to see why")
def test_hint_for_a_gpu_that_is_not_there(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="torch sees no CUDA device") as caught:
        load_model(own, device="cuda")
    assert "--device cpu" in caught.value.hint
    assert main(["doctor"]) == 0
    assert re.search("no  --device cuda +torch ", capsys.readouterr().out)
    assert load_model(own, device="cpu").channels == 4


@pytest.mark.follows("count from cuda:0; `ulae-rt doctor` lists them")
def test_hint_for_a_gpu_that_is_one_too_many(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a machine with one; the network is not really moved there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    places: list[str] = []
    to = UlaeNet.to

    def moved(self: UlaeNet, *place: str, **options: Any) -> UlaeNet:
        places.extend(place)
        return to(self, **options) if options else self

    monkeypatch.setattr(UlaeNet, "to", moved)
    with pytest.raises(BackendUnavailable, match="torch sees 1 of them") as caught:
        load_model(own, device="cuda:1")
    assert "count from cuda:0" in caught.value.hint
    assert main(["doctor"]) == 0
    assert "torch for CUDA 13.0, 1 device(s)" in capsys.readouterr().out
    load_model(own, device="cuda:0")
    assert places == ["cuda:0"]


@pytest.mark.follows("use --precision bf16 or fp32", "use --precision fp32")
def test_hints_for_precisions_that_a_processor_has_not(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    with pytest.raises(BackendUnavailable) as caught:
        load_model(own, precision="fp16")
    assert caught.value.hint == "use --precision bf16 or fp32"
    assert load_model(own, precision="bf16").feature_dtype == torch.bfloat16
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(BackendUnavailable) as caught:
        load_model(own, precision="bf16")
    assert caught.value.hint == "use --precision fp32"
    assert load_model(own, precision="fp32").feature_dtype is None


@pytest.mark.parametrize("device", [None, 3, b"cpu"])
def test_device_that_is_none(own: Path, device: Any) -> None:
    with pytest.raises(UsageError, match=r"device is .*, expected cpu, cuda or cuda:N") as caught:
        load_model(own, device=device)
    assert "device='cpu'" in caught.value.hint
    assert load_model(own, device="cpu").channels == 4


def test_device_of_torch(own: Path) -> None:
    assert load_model(own, device=torch.device("cpu")).channels == 4


@pytest.mark.parametrize("precision", [None, 3, ["fp32"]])
def test_precision_that_is_none(own: Path, precision: Any) -> None:
    with pytest.raises(UsageError, match=r"precision is .*, expected one of fp32, bf16, fp16"):
        load_model(own, precision=precision)


@pytest.mark.parametrize("path", [3, b"x.pth", "", "a\0b.pth"])
def test_path_that_is_none(path: Any) -> None:
    with pytest.raises(UsageError, match="expected a path"):
        load_model(path)
    with pytest.raises(UsageError, match="expected a path"):
        save_checkpoint(path, UlaeNet(channels=4), Metadata(channels=4))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        load_model(tmp_path / ("x" * 5000))
    (tmp_path / "x.pth").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="a link to a file that is not there"):
        load_model(tmp_path / "x.pth")
    (tmp_path / "net.ONNX").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"got '\.ONNX', which is an engine") as caught:
        load_model(tmp_path / "net.ONNX")
    assert "--engine" in caught.value.hint


def test_warnings_of_torch_are_logged_with_the_file(
    tmp_path: Path,
    released: plain.State,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = saved(released, tmp_path / "x.pth")
    load = torch.load

    def warn(*arguments: Any, **options: Any) -> Any:
        warnings.warn("this\nis old", FutureWarning, stacklevel=2)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", warn)
    load_model(path)
    assert caplog.messages == [f"{path}: this is old"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "metadata cannot be saved"),
        (Metadata(channels=8), "metadata has channels 8, and the model 4"),
        (Metadata(channels=4, spacing_mm=0.0), "expected more than 0 mm"),
        (Metadata(channels=4, recipe={"loss": float("nan")}), "metadata cannot be saved"),
    ],
)
def test_what_could_not_be_read_is_not_saved(tmp_path: Path, metadata: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_checkpoint(tmp_path / "x.safetensors", UlaeNet(channels=4), metadata)
    assert not os.listdir(tmp_path)


def test_save_into_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.pt: cannot be written \(No such file"):
        save_checkpoint(tmp_path / "no" / "x.pt", UlaeNet(channels=4), Metadata(channels=4))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([16, 2.0, 10**400, "paper", "max", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data(), remove=st.booleans(), value=ANYTHING)
def test_changed_metadata_means_the_same_or_is_refused(
    data: st.DataObject, remove: bool, value: Any
) -> None:
    values = json.loads(Metadata(versions={"torch": "2"}).to_json())
    name = data.draw(st.sampled_from(sorted(values)))
    values |= {name: value}
    if remove:
        del values[name]
    metadata = None
    try:
        metadata = Metadata.from_json(json.dumps(values), "x.pth")
    except CheckpointError:
        return
    read = json.loads(metadata.to_json())
    assert {key: read[key] for key in values} == values


# Own files that do not fit


def test_own_missing_extra_misshapen_nan(own: Path) -> None:
    good = own.read_bytes()
    for change, message in (
        (lambda t: t.pop("heads.2.bias"), r"1 missing key\(s\), first 'heads\.2\.bias'"),
        (lambda t: t.update(more=torch.zeros(1)), r"1 unknown key\(s\), first 'more'"),
        (lambda t: t.update({"heads.2.bias": torch.zeros(4)}), r"has shape \(4,\), expected \(3,"),
        (lambda t: t["heads.2.bias"].fill_(torch.nan), r"heads\.2\.bias holds NaN or Inf"),
    ):
        own.write_bytes(good)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(rewritten(own, change))
        assert own.name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "huge"}, "variant is 'huge', expected one of paper, release"),
        ({"variant": "release"}, "missing key"),
        ({"channels": 8}, r"has shape .*, expected "),
        ({"channels": "many"}, "its metadata cannot be read"),
        ({"channels": 0}, "channels is int '0', expected 1 to 1024"),
        ({"channels": 10**9}, "channels is int '1000000000', expected 1 to 1024"),
        ({"channels": True}, "channels is bool 'True', expected int"),
        ({"channels": 4.0}, "channels is float '4.0', expected int"),
        ({"accumulate": 1}, "accumulate is int '1', expected bool"),
        ({"normalisation": "zscore"}, "normalisation is 'zscore', expected one of max, p99.9"),
        ({"shape": [80, 96.5, 80]}, r"shape is \[80, 96.5, 80\], expected three whole numbers"),
        ({"shape": [80, 96, 0]}, "expected three whole numbers from 1"),
        ({"spacing_mm": 0}, "spacing_mm is int '0', expected more than 0 mm"),
        ({"spacing_mm": 10**400}, "expected more than 0 mm"),
        ({"licence": None}, "licence is NoneType 'None', expected str"),
        ({"licence": "\ud800"}, "surrogates not allowed"),
        ({"versions": {"torch": 2}}, "the version of 'torch' is int '2', expected str"),
        ({"recipe": []}, "recipe is list"),
        ({"shape": [1, 2]}, r"shape is \[1, 2\], expected three whole numbers"),
        ({"spacing_mm": -1}, "spacing_mm is int .-1., expected more than 0 mm"),
        ({"spacing_mm": "wide"}, "its metadata cannot be read"),
        ({"shape": None}, "its metadata cannot be read"),
        ({"colour": "red"}, "its metadata cannot be read: it has an unknown .colour."),
    ],
    ids=lambda x: str(x)[:24],
)
def test_metadata_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.safetensors"
    model = UlaeNet(channels=4)
    text = json.dumps(json.loads(model.metadata.to_json()) | change)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, {"ulae_rt": text}))
    with pytest.raises((CheckpointError, UsageError), match=message):
        load_model(path)


@pytest.mark.parametrize("text", ["not json", "[]", "3"])
def test_metadata_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"ulae_rt": text}))
    with pytest.raises(CheckpointError, match="its metadata cannot be read"):
        load_model(path)


def test_safetensors_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="holds no 'ulae_rt' metadata"):
        load_model(path)


# Damaged files


@pytest.mark.parametrize(
    "kept", [0, 4, 100, -1], ids=["empty", "4-bytes", "100-bytes", "all-but-1"]
)
def test_truncated_safetensors(own: Path, kept: int) -> None:
    own.write_bytes(own.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"own\.safetensors: damaged or not a weights file"):
        load_model(own)


@pytest.mark.parametrize("kept", [0, 4, 5_000, -200], ids=["empty", "4-bytes", "half", "end"])
def test_truncated_torch_file(tmp_path: Path, released: plain.State, kept: int) -> None:
    path = saved(released, tmp_path / "x.pth")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.pth: damaged or not a weights file") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"these are no weights\n",
        b"<!DOCTYPE html><html>404</html>\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        bytes(range(256)) * 8,
        b"\x1f\x8b\x08" + bytes(64),
        b"PK\x03\x04" + bytes(64),
        b"\x80\x02}q\x00.",
    ],
    ids=["text", "web-page", "lfs-pointer", "bytes", "gzip", "zip", "other-pickle"],
)
def test_garbage(tmp_path: Path, content: bytes, suffix: str) -> None:
    """Damage, and not an accusation: nobody looks for a virus in a failed download."""
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.\w+: damaged or not a weights file") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


# Files that would run code


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.witness)],)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_that_run_code_are_refused(tmp_path: Path, suffix: str, legacy: bool) -> None:
    witness, path = tmp_path / "witness", tmp_path / f"x{suffix}"
    torch.save({"acc1.output.bias": Bomb(witness)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="refused, because reading it could run code"):
        load_model(path)
    assert not witness.exists()


def test_the_bomb_is_live(tmp_path: Path) -> None:
    """Otherwise the test above shows nothing."""
    witness = tmp_path / "witness"
    pickle.loads(pickle.dumps(Bomb(witness)))  # noqa: S301 - the point
    assert witness.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Bomb(witness), protocol=2))
    with pytest.raises(CheckpointError, match="could run code"):
        read_torch(path)
    assert not witness.exists()


# Paths


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.pth: no such weights file") as caught:
        load_model(tmp_path / "best.pth")
    assert caught.value.hint


def test_directory(tmp_path: Path) -> None:
    folder = tmp_path / "engine.pth"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"engine\.pth: "):
        load_model(folder)


@pytest.mark.parametrize("name", ["weights.onnx", "weights", "weights.pth.gz"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"weights end in \.safetensors, \.pt, .*\.bin, \.tar, got"
    ):
        load_model(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(own: Path) -> None:
    own.chmod(0)
    with pytest.raises(CheckpointError, match="no permission to read it"):
        load_model(own)


def test_unreadable_file_whoever_runs_this(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="no permission to read it"):
        load_model(own)


# Precision and device


def test_precisions(own: Path) -> None:
    assert load_model(own, precision="fp32").feature_dtype is None
    with pytest.raises(BackendUnavailable, match="fp16 was asked for on the CPU"):
        load_model(own, precision="fp16")
    with pytest.raises(UsageError, match="precision is 'int8', expected one of fp32, bf16, fp16"):
        load_model(own, precision="int8")


def test_bf16_where_the_processor_has_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = load_model(own, precision="bf16")
    assert model.feature_dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(BackendUnavailable, match="bf16 was asked for, and this processor has no"):
        load_model(own, precision="bf16")


def test_bf16_runs(own: Path) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no AVX-512 to run bf16 on")
    with torch.no_grad():
        out = load_model(own, precision="bf16").predict(*pair())
    assert out.disp.dtype == out.moved.dtype == torch.float32
    assert torch.isfinite(out.disp).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(own: Path) -> None:
    with pytest.raises(BackendUnavailable, match="device cuda was asked for, and torch sees no"):
        load_model(own, device="cuda")


@pytest.mark.parametrize("device", ["graphics", "", "cdua:0"])
def test_unknown_device(own: Path, device: str) -> None:
    with pytest.raises(UsageError, match=rf"device is '{device}', expected cpu, cuda or cuda:N"):
        load_model(own, device=device)


# Writing


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_interrupted_save_leaves_the_old_file(
    own: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = own.read_bytes()

    def fail(self: Path, *arguments: Any) -> None:
        if moment == "write_bytes":
            with self.open("wb") as file:
                file.write(arguments[0][:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, moment, fail)
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(own, UlaeNet(channels=4), Metadata(channels=4))
    assert own.read_bytes() == old
    assert os.listdir(own.parent) == [own.name]


def test_save_replaces(own: Path) -> None:
    save_checkpoint(own, UlaeNet("release", channels=2), Metadata("release", 2))
    assert load_model(own).channels == 2
    assert os.listdir(own.parent) == [own.name]


# The shipped weights


@pytest.mark.skipif(not DEFAULT_WEIGHTS.is_file(), reason="no weights shipped in this checkout")
def test_shipped_weights() -> None:
    model = load_model(None)
    assert model.metadata.training_data
    assert model.metadata.licence
    assert DEFAULT_WEIGHTS.stat().st_size <= 4_000_000
    moving, fixed = smooth_image((32, 32, 32), seed=1), smooth_image((32, 32, 32), seed=2)
    with torch.no_grad():
        disp = model.predict(moving.float(), fixed.float()).disp
    assert torch.isfinite(disp).all()
