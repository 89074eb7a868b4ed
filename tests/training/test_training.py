"""Training runs on a few tiny-network steps: what is learned, logged, kept and gone on from."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.tolerances import TOL, assert_close
from ulae_rt import cli
from ulae_rt.errors import CheckpointError, ConfigError, OutputError, TrainingError
from ulae_rt.files import locked_run
from ulae_rt.losses import Loss
from ulae_rt.manifest import sha256
from ulae_rt.model import Metadata, UlaeNet, load_model, save_checkpoint
from ulae_rt.model.checkpoint import read_torch
from ulae_rt.training import loop, step
from ulae_rt.training.config import (
    AugmentConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    read_config,
)
from ulae_rt.training.data import Pair, PairDataset, find_scans
from ulae_rt.training.loop import Trainer, learning_rate


def write_config(
    path: Path, scans: Path, steps: int, lr: float = 1e-3, batch: int = 1, run: str = ""
) -> Path:
    """On the CPU if ``run`` does not say otherwise: there, twice the same is the same bits."""
    path.write_text(
        f"""
[data]
train = "{scans}"
val = "{scans}"
val_pairs = 2
pool = 4
description = "blobs"
licence = "none"
[output]
folder = "run"
checkpoint_every = 2
validate_every = 4
[model]
channels = 2
[loss]
windows = [5, 3]
smoothness = 0.1
folding = 1.0
[augment]
flip = 0.5
rotation_deg = 5.0
intensity = 0.1
[optimiser]
steps = {steps}
lr = {lr}
batch = {batch}
[run]
{run or 'device = "cpu"'}
"""
    )
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / loop.LOG_FILE).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder / "run" / loop.WEIGHTS_FILE).state_dict())


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    config = write_config(whole / "c.toml", scans, 4)
    assert cli.main(["train", str(config), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 4
    assert result["val_dice"] > 0.5

    assert cli.main(["train", str(write_config(halves / "c.toml", scans, 2))]) == 0
    assert cli.main(["train", str(write_config(halves / "c.toml", scans, 4)), "--resume"]) == 0

    for key, value in weights(whole).items():
        assert torch.equal(value, weights(halves)[key]), key
    assert rows(whole)[-1] == rows(halves)[-1]
    metadata = load_model(whole / "run" / loop.WEIGHTS_FILE).metadata
    assert load_model(whole / "run" / loop.STATE_FILE).metadata == metadata
    assert metadata.shape == (40, 48, 40)
    assert metadata.spacing_mm == 4.0
    assert (metadata.training_data, metadata.licence) == ("blobs", "none")
    assert (whole / "run" / "tensorboard").is_dir()


@pytest.mark.slow
def test_a_run_that_has_minutes_stops_and_goes_on_exactly(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert cli.main(["train", str(write_config(whole / "c.toml", scans, 4))]) == 0
    monkeypatch.setattr(loop, "_LOOK_EVERY", 1)
    config = str(write_config(parts / "c.toml", scans, 4))
    capsys.readouterr()
    assert cli.main(["train", config, "--set", "run.minutes=0.00001"]) == 0
    assert "stopped at step 1, after 1e-05 min; --resume goes on" in capsys.readouterr().out
    for number in (2, 3):
        line = ["train", config, "--set", "run.minutes=0.00001", "--resume", "--json"]
        assert cli.main(line) == 0
        assert json.loads(capsys.readouterr().out)["step"] == number
    assert cli.main(["train", config, "--resume"]) == 0
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[key]), key
    assert rows(whole)[-1] == rows(parts)[-1]


@pytest.mark.slow
@pytest.mark.follows("train it again, with data.pool = 1 or 2 in the configuration")
def test_weights_of_a_grid_that_cannot_be_used_are_trained_again(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def register(weights: Path) -> int:
        pair = ["-m", str(scans / "a.nii.gz"), "-f", str(scans / "b.nii.gz"), "--affine", "none"]
        out = ["-o", str(tmp_path / "moved.nii.gz"), "--weights", str(weights), "--device", "cpu"]
        return cli.main(["register", *pair, *out])

    model = UlaeNet(channels=2)
    odd = tmp_path / "odd.safetensors"
    save_checkpoint(odd, model, Metadata(channels=2, shape=(112, 128, 112), spacing_mm=1.5))
    assert register(odd) == 1
    said = capsys.readouterr().err
    assert "the network's grid has 1.5 mm" in said
    assert "hint: train it again, with data.pool = 1 or 2 in the configuration" in said
    config = write_config(tmp_path / "c.toml", scans, 1)
    assert cli.main(["train", str(config), "--set", "data.pool=2"]) == 0
    assert register(tmp_path / "run" / loop.WEIGHTS_FILE) == 0


@pytest.mark.slow
def test_training_registers(scans: Path, tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path / "c.toml", scans, 40, lr=5e-3))
    config = config.model_copy(
        update={
            "augment": AugmentConfig(),
            "loss": LossConfig(windows=(7,), smoothness=0.05),
            "model": ModelConfig(channels=4),
        }
    )
    result = Trainer(config, resume=False).run(lambda _: None)
    assert result["val_dice"] > result["val_baseline"] + 0.01


@pytest.mark.slow
def test_a_run_that_begins_with_weights_and_learns_from_labels(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "c.toml", scans, 2)
    assert cli.main(["train", str(tmp_path / "c.toml")]) == 0
    first = tmp_path / "run" / loop.WEIGHTS_FILE
    digest = sha256(first.read_bytes())
    moved = first.rename(tmp_path / "first.safetensors")

    def configure(steps: int, start: str) -> str:
        path = write_config(tmp_path / "next.toml", scans, steps)
        text = path.read_text().replace('"run"', '"next"').replace("[optimiser]", start)
        path.write_text(text.replace("windows = [5, 3]", "windows = [5]\nlabels = 1.0"))
        return str(path)

    start = f'[optimiser]\nstart = "{moved}"'
    assert cli.main(["train", configure(2, start)]) == 0
    # A run that goes on has its own weights: those it began with may be gone.
    moved.unlink()
    assert cli.main(["train", configure(3, start), "--resume"]) == 0
    trained = load_model(tmp_path / "next" / loop.WEIGHTS_FILE)
    assert trained.metadata.recipe["start"] == digest
    with (tmp_path / "next" / loop.LOG_FILE).open(newline="") as file:
        assert 0 < float(list(csv.DictReader(file))[-1]["labels"]) < 1

    capsys.readouterr()
    other = configure(2, start).replace("next.toml", "other.toml")
    Path(other).write_text(
        (tmp_path / "next.toml").read_text().replace('"next"', '"other"').replace(
            f"{moved}", f"{tmp_path / 'next' / loop.WEIGHTS_FILE}"
        ).replace("channels = 2", "channels = 4")
    )  # fmt: skip
    assert cli.main(["train", other]) == 1
    assert "its channels is 2, and model.channels is 4" in capsys.readouterr().err


def poison(monkeypatch: pytest.MonkeyPatch, *indices: int) -> None:
    """Training pairs that consist of NaN."""
    original = PairDataset.__getitem__

    def poisoned(self: PairDataset, index: int) -> Pair:
        pair = original(self, index)
        return pair._replace(moving=pair.moving * np.nan) if index in indices else pair

    monkeypatch.setattr(PairDataset, "__getitem__", poisoned)


# Of step 4 the host reads the losses at once, for it is logged; of step 3 only after step 4.
@pytest.mark.parametrize("bad", [3, 4])
def test_a_loss_that_is_not_finite_stops_with_the_pair_and_the_state_before_it(
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: int,
) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 5)
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    for folder, steps in ((clean, bad), (broken, 9)):
        folder.mkdir()
        text = write_config(folder / "c.toml", scans, steps).read_text()
        text = text.replace("checkpoint_every = 2", "").replace("validate_every = 4", "")
        (folder / "c.toml").write_text(text)
    assert cli.main(["train", str(clean / "c.toml")]) == 0
    poison(monkeypatch, bad)
    assert cli.main(["train", str(broken / "c.toml")]) == 1

    config = read_config(broken / "c.toml")
    name = PairDataset(find_scans(scans), 0, 4, config.augment)[bad].name
    error = capsys.readouterr().err
    assert f"error: step {bad}: the loss of {name} is nan\n" in error
    before, after = (read_torch(folder / "run" / loop.STATE_FILE) for folder in (clean, broken))
    assert after["step"] == before["step"] == bad
    for key, value in before["model"].items():
        assert torch.equal(value, after["model"][key]), key
    for moments, found in zip(
        before["optimiser"]["state"].values(), after["optimiser"]["state"].values(), strict=True
    ):
        assert all(torch.equal(moments[key], found[key]) for key in ("step", "exp_avg"))


def test_every_pair_whose_loss_is_not_finite_is_named(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 0, 2)
    config = write_config(tmp_path / "c.toml", scans, 4, batch=4, run="micro_batch = 2")
    assert cli.main(["train", str(config)]) == 1
    dataset = PairDataset(find_scans(scans), 0, 4, AugmentConfig())
    error = capsys.readouterr().err
    assert [dataset[k].name for k in range(4) if f"{dataset[k].name} is nan" in error] == [
        dataset[0].name,
        dataset[2].name,
    ]


def test_a_gradient_that_is_not_finite_stops_too(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = step.registration_loss

    def kinked(moved: torch.Tensor, *args: object, **kwargs: object) -> Loss:
        loss = original(moved, *args, **kwargs)  # type: ignore[arg-type]
        return loss._replace(total=loss.total + (0 * moved.sum()).sqrt())

    monkeypatch.setattr(step, "registration_loss", kinked)
    assert cli.main(["train", str(write_config(tmp_path / "c.toml", scans, 4))]) == 1
    assert "error: step 0: the gradient of " in capsys.readouterr().err
    load_model(tmp_path / "run" / loop.WEIGHTS_FILE)  # would refuse NaN


@pytest.mark.gpu
def test_a_gpu_run_goes_on_with_other_settings(scans: Path, tmp_path: Path) -> None:
    """And ends where the CPU does: with readers, pinned memory, changes and graphs on the way."""
    expected, found = tmp_path / "cpu", tmp_path / "gpu"
    for folder in (expected, found):
        folder.mkdir()
    assert cli.main(["train", str(write_config(expected / "c.toml", scans, 4, batch=2))]) == 0
    path = found / "c.toml"
    write_config(path, scans, 2, batch=2, run='device = "cuda"\nmicro_batch = 2')
    assert cli.main(["train", str(path)]) == 0
    write_config(path, scans, 4, batch=2, run='device = "cuda"\ncuda_graph = true')
    assert cli.main(["train", str(path), "--resume"]) == 0
    ends = [float(rows(folder)[-1]["loss"]) for folder in (found, expected)]
    assert_close("loss", *(torch.tensor(end) for end in ends), TOL["losses of 20 steps"])


@pytest.mark.follows("only optimiser.steps may change on --resume")
def test_an_earlier_run_is_not_overwritten(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.toml", scans, 1)
    assert cli.main(["train", str(config)]) == 0
    before = (tmp_path / "run" / loop.STATE_FILE).read_bytes()
    assert cli.main(["train", str(config)]) == 1
    assert "holds an earlier run" in capsys.readouterr().err
    assert (tmp_path / "run" / loop.STATE_FILE).read_bytes() == before

    changed = write_config(tmp_path / "c.toml", scans, 2, lr=1e-2)
    assert cli.main(["train", str(changed), "--resume"]) == 1
    said = capsys.readouterr().err
    assert "[optimiser] differs" in said
    assert "hint: only optimiser.steps may change on --resume" in said
    assert cli.main(["train", str(changed), "--resume", "--set", "optimiser.lr=1e-3"]) == 0


@pytest.mark.follows("start without --resume")
def test_nothing_to_resume(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(write_config(tmp_path / "c.toml", scans, 1)), "--resume"]) == 1
    said = capsys.readouterr().err
    assert "nothing to resume" in said
    assert not (tmp_path / "run").exists()
    assert "hint: start without --resume" in said
    assert cli.main(["train", str(tmp_path / "c.toml")]) == 0


def test_learning_rate() -> None:
    config = OptimiserConfig(steps=110, lr=1.0, lr_final=0.2, warmup=10)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx(0.6)
    assert learning_rate(config, 110) == pytest.approx(0.2)
    assert learning_rate(OptimiserConfig(steps=5, lr=0.3), 4) == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data", "not valid TOML"),
        ("[data]\ntrain='x'", "output: Field required"),
        ("[data]\ntrain='x'\ntrian='y'\n[output]\nfolder='r'", r"data.trian: Extra inputs"),
        ("[data]\ntrain='x'\n[output]\nfolder='r'\n[loss]\nwindows=[4]", "loss.windows: .*odd"),
        ("[data]\ntrain='x'\nworkers=-1\n[output]\nfolder='r'", "data.workers"),
        ("[data]\ntrain='x'\n[output]\nfolder='r'\n[run]\ndevice='gpu'", "run.device: .*'gpu'"),
        ("[data]\ntrain='x'\npool=3\n[output]\nfolder='r'", "data.pool: "),
        ("[data]\ntrain='x'\n[output]\nfolder='r'\n[optimiser]\nlr=-1.0", "optimiser.lr: "),
        ("[data]\ntrain='x'\n[output]\nfolder='r'\n[optimiser]\nlr=inf", "optimiser.lr: .*finite"),
        ("[data]\ntrain='x'\n[output]\nfolder='r'\n[loss]\ngamma=nan", "loss.gamma: "),
        ("[data]\ntrain='x'\n[output]\nfolder='r'\n[optimiser]\nsteps=true", "expected no boolean"),
        (
            "[data]\ntrain='x'\n[output]\nfolder='r'\n[augment]\nscale=[1.1,0.9]",
            "smaller one first",
        ),
        ("[data]\ntrain='x'\nval_pairs=3\n[output]\nfolder='r'", "data.val_pairs has no effect"),
        (
            "[data]\ntrain='x'\n[output]\nfolder='r'\nvalidate_every=3",
            "output.validate_every has no",
        ),
        (
            "[data]\ntrain='x'\n[output]\nfolder='r'\n[optimiser]\nlr=1e-4\nlr_final=1e-3",
            "is above",
        ),
        (
            "[data]\ntrain='x'\n[output]\nfolder='r'\n[run]\ndevice='cpu'\ncuda_graph=true",
            "run.cuda_graph has no effect on the CPU",
        ),
        ("a = " + "[" * 50_000, "not valid TOML|nested too deep"),
    ],
)
def test_bad_configurations(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_encodings_of_a_configuration(tmp_path: Path) -> None:
    path, text = tmp_path / "c.toml", "[data]\ntrain='x'\n[output]\nfolder='r'"
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match="it is UTF-16 text, expected UTF-8") as caught:
        read_config(path)
    assert caught.value.hint == "save it as UTF-8"
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert read_config(path).data.train == tmp_path / "x"


@pytest.mark.follows(
    "add --resume to go on with it, or give another output.folder",
    "set more steps: --set optimiser.steps=N",
)
def test_two_runs_into_one_folder(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(write_config(tmp_path / "c.toml", scans, 1))
    with locked_run(tmp_path / "run"), pytest.raises(OutputError, match="another run is writing"):
        Trainer(config, resume=False).run(lambda _: None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    # Two that were both started before either had written anything.
    first, second = (Trainer(config, resume=False) for _ in range(2))
    first.run(lambda _: None)
    before = (tmp_path / "run" / loop.STATE_FILE).read_bytes()
    with pytest.raises(TrainingError, match=r"another run has written to .* since") as caught:
        second.run(lambda _: None)
    assert (tmp_path / "run" / loop.STATE_FILE).read_bytes() == before
    assert "add --resume to go on with it" in caught.value.hint
    # The hint, and what it says when nothing is left to do.
    other = ["train", str(tmp_path / "c.toml"), "--set", f"output.folder={tmp_path / 'other'}"]
    assert cli.main(other) == 0
    with pytest.raises(
        CheckpointError, match=r"has done 1 steps, and optimiser.steps is 1"
    ) as caught:
        Trainer(config, resume=True)
    assert caught.value.hint == "set more steps: --set optimiser.steps=N"
    more = ["train", str(tmp_path / "c.toml"), "--set", "optimiser.steps=2", "--resume"]
    assert cli.main(more) == 0
    assert load_model(tmp_path / "run" / loop.WEIGHTS_FILE).metadata.recipe["step"] == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: {"model": state["model"]}, "is no state of a training run"),
        (lambda state: {**state, "config": "{}"}, "is no state of a training run"),
        (lambda state: {**state, "step": "many"}, "is no state of a training run"),
        (lambda state: {**state, "optimiser": []}, "is no state of a training run"),
        (lambda state: {**state, "model": {}}, "is no state of a training run"),
        (lambda state: {**state, "random": torch.zeros(3)}, "is no state of a training run"),
    ],
)
def test_a_state_that_is_none_is_said(
    trained: Path, tmp_path: Path, damage: Callable[[dict[str, object]], object], message: str
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run" / loop.STATE_FILE
    torch.save(damage(read_torch(path)), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Trainer(read_config(tmp_path / "c.toml", ["optimiser.steps=3"]), resume=True)
    assert caught.value.hint


@pytest.fixture(scope="module")
def trained(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a configuration and its run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(["train", str(write_config(folder / "c.toml", scans, 1))]) == 0
    return folder


@pytest.mark.parametrize("text", ["step,loss\nmany,1\n", "a,b\n1,2\n", "step\n1\n\0", "\xff"])
def test_a_log_that_is_none_is_said_and_the_hint_works(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "run" / loop.LOG_FILE
    log.write_text(text, encoding="latin-1")
    command = ["train", str(tmp_path / "c.toml"), "--set", "optimiser.steps=2", "--resume"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "log.csv: is no log of this run" in said
    assert "hint: move it away: a new one begins at this step" in said
    log.rename(tmp_path / "moved.csv")
    assert cli.main(command) == 0


def test_a_full_disk_is_said(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "run" / loop.STATE_FILE).read_bytes()
    monkeypatch.setattr(loop.torch, "save", full)
    command = ["train", str(tmp_path / "c.toml"), "--set", "optimiser.steps=2", "--resume"]
    assert cli.main(command) == 1
    assert "state.pt cannot be written: PytorchStreamWriter failed" in capsys.readouterr().err
    assert (tmp_path / "run" / loop.STATE_FILE).read_bytes() == before
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "none.toml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "hint: " in error


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[data]\ntrain='scans'\n[output]\nfolder='run'")
    config = read_config(path)
    assert config.data.train == tmp_path / "scans"
    assert config.output.folder == tmp_path / "run"


def test_entries_changed_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "c.toml"
    path.write_text("[data]\ntrain='scans'\nval='other'\n[output]\nfolder='run'")
    changes = [
        "output.folder=runs/a=b", "model.accumulate=false", "loss.windows=[7]", "run.device=cpu",
        "optimiser.lr = 1e-3", 'data.val="../elsewhere"', "optimiser.lr=2e-3",
    ]  # fmt: skip
    config = read_config(path, changes)
    assert config.data.train == tmp_path / "scans"
    assert config.data.val is not None
    assert config.data.val.resolve() == tmp_path / "elsewhere"
    assert config.output.folder == tmp_path / "here" / "runs" / "a=b"
    assert not config.model.accumulate
    assert config.loss.windows == (7,)
    assert config.run.device == "cpu"
    assert config.optimiser.lr == 2e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=4", "--set steps=4: expected SECTION.KEY=VALUE"),
        ("optimiser.steps", "expected SECTION.KEY=VALUE"),
        ("optimiser.=4", "expected SECTION.KEY=VALUE"),
        ("optimiser.stops=4", r"optimiser.stops: Extra inputs"),
        ("nonsense.a.b=4", r"nonsense: Extra inputs"),
        ("optimiser.steps=many", "optimiser.steps: .*got 'many'"),
        ("data.train=4", "data.train: "),
    ],
)
def test_bad_changes(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[data]\ntrain='x'\n[output]\nfolder='r'")
    with pytest.raises(ConfigError, match=message):
        read_config(path, [change])


@pytest.mark.parametrize("name", ["paper.toml", "oasis-2mm.toml", "oasis-2mm-labels.toml"])
def test_shipped_configurations_are_valid(name: str) -> None:
    read_config(Path(__file__).parents[2] / "configs" / name)


# Hints, followed


@pytest.mark.follows("for example --set optimiser.steps=500")
def test_hint_for_a_change_without_a_section(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[data]\ntrain='x'\n[output]\nfolder='r'")
    with pytest.raises(ConfigError, match=r"expected SECTION\.KEY=VALUE") as caught:
        read_config(path, ["steps=500"])
    change = caught.value.hint.partition("--set ")[2]
    assert read_config(path, [change]).optimiser.steps == 500


@pytest.mark.follows("give them the same, or other weights as optimiser.start")
def test_hint_for_weights_of_another_network(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for channels in (2, 4):
        path = tmp_path / f"{channels}.safetensors"
        save_checkpoint(path, UlaeNet(channels=channels), Metadata(channels=channels))
    command = ["train", str(write_config(tmp_path / "c.toml", scans, 1)), "--set"]
    wrong = [*command, f"optimiser.start={tmp_path / '4.safetensors'}", "--set"]
    assert cli.main(wrong[:-1]) == 1
    assert "hint: give them the same, or other weights as" in capsys.readouterr().err
    assert cli.main([*wrong, "model.channels=4", "--set", f"output.folder={tmp_path}/same"]) == 0
    assert cli.main([*command, f"optimiser.start={tmp_path / '2.safetensors'}"]) == 0


@pytest.mark.follows("mend these scans and add --resume, which goes on before this step; or lower")
@pytest.mark.parametrize("remedy", ["mended", "lower"])
def test_hint_for_a_loss_that_is_not_finite(
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    remedy: str,
) -> None:
    command = ["train", str(write_config(tmp_path / "c.toml", scans, 2))]
    with monkeypatch.context() as patch:
        poison(patch, 1)
        assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "hint: mend these scans and add --resume" in said
    state = said.strip().rpartition("optimiser.start = ")[2]
    assert read_torch(Path(state))["step"] == 1
    if remedy == "mended":
        assert cli.main([*command, "--resume"]) == 0
        return
    changes = ("optimiser.lr=1e-4", f"output.folder={tmp_path}/lower", f"optimiser.start={state}")
    assert cli.main([*command, *(word for each in changes for word in ("--set", each))]) == 0
    assert load_model(tmp_path / "lower" / loop.WEIGHTS_FILE).metadata.recipe["step"] == 2


@pytest.mark.follows("give the output.folder of a run; weights alone go into optimiser.start")
def test_hint_for_weights_given_as_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path / "run" / loop.WEIGHTS_FILE)
    alone = tmp_path / "weights" / loop.STATE_FILE
    alone.parent.mkdir()
    torch.save({"model": model.state_dict(), "ulae_rt": model.metadata.to_json()}, alone)
    command = ["train", str(tmp_path / "c.toml"), "--set", "optimiser.steps=2"]
    assert cli.main([*command, "--resume", "--set", f"output.folder={alone.parent}"]) == 1
    assert "hint: give the output.folder of a run; weights" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "--set", f"output.folder={tmp_path / 'run'}"]) == 0
    changes = ["--set", f"output.folder={tmp_path / 'new'}", "--set", f"optimiser.start={alone}"]
    assert cli.main([*command, *changes]) == 0
