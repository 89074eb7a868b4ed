"""One optimiser step: micro-batches, checkpointing, memory, compilation, CUDA graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from _support.tolerances import TOL, assert_close, assert_equal
from ulae_rt import cli
from ulae_rt.errors import BackendUnavailable, ConfigError, TrainingError
from ulae_rt.losses import Loss, registration_loss
from ulae_rt.model import UlaeNet
from ulae_rt.training import processes
from ulae_rt.training.config import (
    DataConfig,
    LossConfig,
    OptimiserConfig,
    OutputConfig,
    RunConfig,
    TrainConfig,
)
from ulae_rt.training.data import Batch, Change
from ulae_rt.training.processes import Processes
from ulae_rt.training.step import Step

UNCHANGED = (Change(None, None), Change(None, None))
RATE = 1e-3
# torch warns about its own code while it compiles, and looks at gradients that are not there.
compiles = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
LOSS = LossConfig(windows=(5, 3))


def network(dtype: torch.dtype = torch.float32, channels: int = 2) -> UlaeNet:
    """Seeded, with heads that move something from the start."""
    torch.manual_seed(0)
    model = UlaeNet(channels=channels)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, 0.0, 0.05)  # type: ignore[arg-type]
    return model.to(dtype)


def configuration(batch: int = 1, loss: LossConfig = LOSS, **run: Any) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=Path("unused")),
        output=OutputConfig(folder=Path("unused")),
        loss=loss,
        optimiser=OptimiserConfig(batch=batch),
        run=RunConfig(**{"device": "cpu", **run}),
    )


def new_step(config: TrainConfig, channels: int = 2) -> Step:
    alone = Processes(config.run.device)
    return Step(network(channels=channels).to(alone.device), config, alone)


def batches(
    count: int, size: int, edge: int = 16, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """``count`` micro-batches of ``size`` smooth random pairs, the same pairs for every size."""
    random = torch.Generator().manual_seed(3)
    coarse = torch.rand(2, count * size, 1, edge // 4, edge // 4, edge // 4, generator=random)
    moving, fixed = (
        torch.nn.functional.interpolate(x, scale_factor=4.0, mode="trilinear").to(dtype)
        for x in coarse
    )
    names = [f"pair {k}" for k in range(count * size)]
    return [
        Batch(
            moving[k : k + size].contiguous(),
            fixed[k : k + size].contiguous(),
            [UNCHANGED] * size,
            names[k : k + size],
        )
        for k in range(0, count * size, size)
    ]


def gradients(step: Step) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])


def curve(step: Step, steps: int, edge: int = 16) -> torch.Tensor:
    """The total loss of ``steps`` steps on a pair that stays the same."""
    pairs = batches(1, 1, edge)
    losses = []
    for k in range(steps):
        loss = step(k, pairs, RATE).losses()
        assert loss is not None
        losses.append(loss.total)
    return torch.stack(losses)


def test_a_batch_is_the_mean_of_its_pairs_in_float64() -> None:
    model = network(torch.float64)
    found = []
    for size in (2, 1):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(2 // size, size, dtype=torch.float64):
            moved, disp = model.predict(batch.moving, batch.fixed)
            loss = registration_loss(moved, batch.fixed, disp, windows=(5, 3), folding=1.0).total
            (loss * size / 2).backward()
            total += loss.detach() * size / 2
        found.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert_close("loss", found[0][0], found[1][0], TOL["op float64"])
    assert_close("gradient", found[0][1], found[1][1], TOL["block float64 gradient"])


def test_predicting_is_the_same_arithmetic_as_the_full_output() -> None:
    pair = batches(1, 1)[0]
    found = []
    for entry in ("predict", "forward"):
        model = network()
        out = getattr(model, entry)(pair.moving, pair.fixed)
        registration_loss(out.moved, pair.fixed, out.disp, windows=(5,)).total.backward()
        found.append((out.moved, out.disp, *(p.grad for p in model.parameters())))
    for i, (predicted, full) in enumerate(zip(*found, strict=True)):
        assert_equal(f"result {i}", predicted, full)


def test_micro_batches_add_up_to_the_step() -> None:
    whole, parts = (new_step(configuration(4, micro_batch=size)) for size in (4, 1))
    losses = [
        step(0, batches(4 // size, size), RATE).losses() for step, size in ((whole, 4), (parts, 1))
    ]
    assert losses[0] is not None
    assert losses[1] is not None
    for name, one, other in zip(Loss._fields, *losses, strict=True):
        assert_close(name, one, other, TOL["op float32"])
    # Relative to the largest: a displacement's gradient sums over all voxels.
    scale = gradients(parts).abs().max()
    assert_close("gradient", gradients(whole) / scale, gradients(parts) / scale, TOL["op float32"])


def test_a_step_is_adam_on_the_gradient_of_the_loss() -> None:
    step, plain = new_step(configuration()), network()
    adam = torch.optim.Adam(plain.parameters(), lr=RATE)
    pair = batches(1, 1)[0]
    for k in range(3):
        loss = step(k, [pair], RATE).losses()
        adam.zero_grad()
        moved, disp = plain.predict(pair.moving, pair.fixed)
        expected = registration_loss(moved, pair.fixed, disp, windows=(5, 3))
        expected.total.backward()
        adam.step()
        assert loss is not None
        assert_close(f"loss {k}", loss.total, expected.total, TOL["op float32"])
    for (name, one), other in zip(step.model.named_parameters(), plain.parameters(), strict=True):
        assert_close(name, one, other, TOL["op float32"])


def test_the_progressive_loss_compares_the_third_image() -> None:
    pair = batches(1, 1)[0]
    config = configuration(loss=LossConfig(windows=(5,), progressive=True))
    loss = new_step(config)(0, [pair], RATE).losses()
    out = network()(pair.moving, pair.fixed)
    expected = registration_loss(out.progressive[-1], pair.fixed, out.disp, windows=(5,))
    other = registration_loss(out.moved, pair.fixed, out.disp, windows=(5,))
    assert loss is not None
    assert_equal("loss", loss.total, expected.total.detach())
    assert float((loss.total - other.total).detach().abs()) > 1e-4


def test_a_step_that_is_not_finite_changes_nothing_ever_after() -> None:
    step = new_step(configuration())
    good = batches(1, 1)
    bad = [good[0]._replace(moving=good[0].moving * torch.nan)]
    assert step(0, good, RATE).losses() is not None
    weights = [p.detach().clone() for p in step.model.parameters()]
    assert step(1, bad, RATE).losses() is None
    assert step(2, good, RATE).losses() is None
    for before, after in zip(weights, step.model.parameters(), strict=True):
        assert_equal("weights", after.detach(), before)
    assert {float(s["step"]) for s in step.optimiser.state.values()} == {1.0}
    assert step.not_finite(good + bad) == ["the loss of pair 0 is nan"]


def test_checkpointing_gives_the_same_gradients_bit_for_bit() -> None:
    off, on = (
        new_step(configuration(activation_checkpointing=setting)) for setting in ("off", "on")
    )
    assert_equal("loss", curve(on, 2), curve(off, 2))
    assert_equal("gradient", gradients(on), gradients(off))


def test_checkpointing_computes_twice_what_it_does_not_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = UlaeNet._step, []

    def counted(self: UlaeNet, step: int, *args: Any) -> torch.Tensor:
        calls.append(step)
        return original(self, step, *args)

    monkeypatch.setattr(UlaeNet, "_step", counted)
    curve(new_step(configuration(activation_checkpointing="on")), 1)
    assert calls == [1, 2, 3, 3, 2, 1]


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    """The network's second call, while it keeps its features, or every call."""
    original, calls = UlaeNet.predict, []

    def predict(self: UlaeNet, *images: torch.Tensor) -> Any:
        calls.append(None)
        if always or (len(calls) == 2 and not self.checkpointing):
            raise torch.OutOfMemoryError("pretended")
        return original(self, *images)

    monkeypatch.setattr(UlaeNet, "predict", predict)


def test_when_memory_runs_out_the_step_is_done_again_with_checkpointing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = new_step(configuration(2, activation_checkpointing="on"))
    expected(0, batches(2, 1), RATE)
    run_out_of_memory(monkeypatch, always=False)
    step = new_step(configuration(2))
    assert step(0, batches(2, 1), RATE).losses() is not None
    assert step.model.checkpointing
    assert_equal("gradient", gradients(step), gradients(expected))
    assert "cpu ran out of memory: activation checkpointing is on now" in caplog.text


@pytest.mark.parametrize("setting", ["auto", "on", "off"])
def test_when_memory_runs_out_for_good_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    run_out_of_memory(monkeypatch, always=True)
    step = new_step(configuration(activation_checkpointing=setting))
    tried = "off" if setting == "off" else "on"
    with pytest.raises(TrainingError, match=f"1 pair.* checkpointing {tried}$") as caught:
        step(0, batches(1, 1), RATE)
    assert "lower run.micro_batch where it is above 1" in caught.value.hint


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_a_compiled_network_learns_the_same(checkpointing: str) -> None:
    eager = curve(new_step(configuration()), 4)
    compiled = curve(
        new_step(configuration(compile=True, activation_checkpointing=checkpointing)), 4
    )
    assert_close("losses", compiled, eager, TOL["losses of 4 steps"])


@compiles
def test_where_nothing_can_be_compiled_it_says_what_is_missing() -> None:
    step = new_step(configuration(compile=True))

    def failing(*images: torch.Tensor) -> Any:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)

    step._network = failing
    with pytest.raises(BackendUnavailable, match=r"^torch\.compile failed: .*no compiler$"):
        step(0, batches(1, 1), RATE)


def test_settings_that_do_not_fit_the_machine() -> None:
    with pytest.raises(ConfigError, match=r"run\.cuda_graph needs a CUDA device, .* is on cpu"):
        new_step(configuration(cuda_graph=True))
    with pytest.raises(
        ConfigError, match=r"optimiser\.batch is 3, expected a multiple of 2: 1 pro"
    ):
        new_step(configuration(3, micro_batch=2))
    with pytest.raises(BackendUnavailable, match=r"run\.device is 'cuda:99' and needs GPU 99"):
        Processes("cuda:99")


@pytest.mark.slow
def test_twenty_steps_with_triton_are_those_with_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four minutes in Triton's interpreter: a step is 170 launches, however small the volume."""
    pytest.importorskip("triton")
    found = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("ULAE_RT_KERNELS", kernels)
        found.append(curve(new_step(configuration(device="auto")), 20))
    assert found[0][-1] < found[0][0] - 0.1
    assert_close("losses", found[1], found[0], TOL["losses of 20 interpreted steps"])


@pytest.mark.gpu
def test_twenty_steps_on_a_gpu_are_those_of_the_reference_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ULAE_RT_KERNELS", "reference")
    expected = curve(new_step(configuration(), channels=8), 20, edge=48)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    found = curve(new_step(configuration(device="cuda"), channels=8), 20, edge=48)
    assert expected[-1] < expected[0] - 0.3
    assert_close("losses", found, expected, TOL["losses of 20 steps"])


@compiles
@pytest.mark.gpu
@pytest.mark.parametrize(
    "run",
    [
        {"cuda_graph": True},
        {"compile": True},
        {"compile": True, "cuda_graph": True},
        {"cuda_graph": True, "activation_checkpointing": "on"},
    ],
    ids=["graph", "compile", "compile-graph", "graph-checkpointing"],
)
def test_every_way_to_run_on_a_gpu_learns_the_same(run: dict[str, Any]) -> None:
    eager = curve(new_step(configuration(device="cuda"), channels=8), 10, edge=48)
    other = curve(new_step(configuration(device="cuda", **run), channels=8), 10, edge=48)
    assert eager[-1] < eager[0]
    assert_close("losses", other, eager, TOL["losses of 20 steps"])


@pytest.mark.gpu
def test_a_graph_replays_what_it_is_given_and_adds_up() -> None:
    """Other images than it was recorded with, and more than one micro-batch a step."""
    config = configuration(3, device="cuda")
    graph = new_step(config.model_copy(update={"run": RunConfig(device="cuda", cuda_graph=True)}))
    eager = new_step(config)
    for k in range(2):
        losses = [step(k, batches(3, 1, 32), RATE).losses() for step in (graph, eager)]
        assert losses[0] is not None
        assert losses[1] is not None
        assert_close(f"loss {k}", losses[0].total, losses[1].total, TOL["losses of 20 steps"])


@pytest.mark.gpu
def test_a_step_that_is_not_finite_is_refused_by_a_graph_too() -> None:
    step = new_step(configuration(device="cuda", cuda_graph=True))
    good = batches(1, 1)
    assert step(0, good, RATE).losses() is not None
    weights = [p.detach().clone() for p in step.model.parameters()]
    outcomes = [
        step(1, [good[0]._replace(moving=good[0].moving * torch.nan)], RATE),
        step(2, good, RATE),
    ]
    assert [outcome.losses() for outcome in outcomes] == [None, None]
    for before, after in zip(weights, step.model.parameters(), strict=True):
        assert_equal("weights", after.detach(), before)


@pytest.mark.follows("change run.micro_batch or the number of processes")
def test_a_batch_is_shared_out_by_another_micro_batch_or_number_of_processes() -> None:
    with pytest.raises(ConfigError) as caught:
        new_step(configuration(3, micro_batch=2))
    assert caught.value.hint == "change run.micro_batch or the number of processes"
    assert new_step(configuration(3, micro_batch=3))(0, batches(1, 3), RATE).losses() is not None
    several = Processes("cpu")
    several.size = 2
    with pytest.raises(ConfigError, match=r"multiple of 2: 2 process\(es\) with run\.micro_batch"):
        Step(network(), configuration(3), several)
    several.size = 3
    assert Step(network(), configuration(3), several).share == 1 / 3


@pytest.mark.follows("set run.cuda_graph = false")
def test_without_a_graph_the_cpu_trains() -> None:
    with pytest.raises(ConfigError) as caught:
        new_step(configuration(cuda_graph=True))
    assert caught.value.hint == "set run.cuda_graph = false"
    step = new_step(configuration(cuda_graph=False))
    assert step(0, batches(1, 1), RATE).losses() is not None


SMALL_RUN = """
[data]
train = "set on the command line"
pool = 4
[output]
folder = "set on the command line"
[model]
channels = 2
[loss]
windows = [5]
[optimiser]
steps = 1
batch = 2
[run]
device = "cpu"
"""


def memory_for(
    monkeypatch: pytest.MonkeyPatch, enough: Callable[[UlaeNet, torch.Tensor], bool]
) -> None:
    """A machine whose memory suffices for what ``enough`` says of a network and its images."""
    original = UlaeNet.predict

    def predict(self: UlaeNet, *images: torch.Tensor) -> Any:
        if not enough(self, images[0]):
            raise torch.OutOfMemoryError("pretended")
        return original(self, *images)

    monkeypatch.setattr(UlaeNet, "predict", predict)


@pytest.mark.follows(
    "lower run.micro_batch where it is above 1, or set run.activation_checkpointing = 'on', "
    "optimiser.precision = 'bf16' or data.pool = 2"
)
@pytest.mark.parametrize(
    ("settings", "remedy", "enough"),
    [
        (["run.micro_batch=2"], "run.micro_batch=1", lambda model, images: len(images) == 1),
        (
            ["run.activation_checkpointing='off'"],
            "run.activation_checkpointing='on'",
            lambda model, images: model.checkpointing,
        ),
        (
            [],
            "optimiser.precision='bf16'",
            lambda model, images: model.feature_dtype == torch.bfloat16,
        ),
        (["data.pool=1"], "data.pool=2", lambda model, images: images.shape[-1] <= 80),
    ],
    ids=["micro-batch", "checkpointing", "precision", "pool"],
)
def test_each_of_these_takes_less_memory(
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    remedy: str,
    enough: Callable[[UlaeNet, torch.Tensor], bool],
) -> None:
    memory_for(monkeypatch, enough)
    config = tmp_path / "c.toml"
    config.write_text(SMALL_RUN)
    line = ["train", str(config), "--set", f"data.train={scans}"]
    line += ["--set", f"output.folder={tmp_path / 'run'}"]
    for setting in settings:
        line += ["--set", setting]
    assert cli.main(line) == 1
    said = capsys.readouterr().err
    assert "cpu has too little memory for" in said
    assert "hint: lower run.micro_batch where it is above 1, or set run.activation" in said
    assert cli.main([*line, "--set", remedy]) == 0
    assert (tmp_path / "run" / "last.safetensors").exists()


@compiles
@pytest.mark.follows("set run.compile = false, or install what it needs")
def test_without_compiling_it_trains() -> None:
    step = new_step(configuration(compile=True))

    def failing(*images: torch.Tensor) -> Any:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)

    step._network = failing
    with pytest.raises(BackendUnavailable) as caught:
        step(0, batches(1, 1), RATE)
    assert caught.value.hint.startswith("set run.compile = false, or install what it needs: ")
    assert new_step(configuration(compile=False))(0, batches(1, 1), RATE).losses() is not None


@pytest.mark.follows("set run.device to 'cpu', start fewer processes, or see `ulae-rt doctor`")
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendUnavailable) as caught:
        processes._device("cuda", local_rank=1)  # as the second of two
    assert caught.value.hint == (
        "set run.device to 'cpu', start fewer processes, or see `ulae-rt doctor`"
    )
    assert processes._device("cpu", local_rank=1) == torch.device("cpu")
    assert processes._device("cuda", local_rank=0) == torch.device("cuda", 0)  # the only one
    monkeypatch.undo()
    assert cli.main(["doctor"]) == 0
    assert "--device cuda" in capsys.readouterr().out


@pytest.mark.follows("set run.device to 'cuda': each takes the GPU of its local rank")
def test_processes_that_torchrun_started_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name, answer in (
        ("is_torchelastic_launched", True), ("get_node_local_rank", 1), ("get_rank", 1),
        ("get_world_size", 2), ("init_process_group", None),
    ):  # fmt: skip
        monkeypatch.setattr(processes.dist, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with pytest.raises(ConfigError) as caught:
        Processes("cuda:0")
    assert caught.value.hint == ("set run.device to 'cuda': each takes the GPU of its local rank")
    assert Processes("cuda").device == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]
