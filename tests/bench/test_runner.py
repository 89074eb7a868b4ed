"""A case is measured once; what is right is told to pytest-benchmark, round by round."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from _support import plain_ulae as plain
from _support.ops import OPS
from harness.case import FULL, PACKAGE, Case, LeftOut, Measured, Outcome, Setting
from harness.rounds import LEAST, interleaved
from harness.runner import Playback, Runner
from suites import kernels, network

SETTING = Setting(small=True, rounds=2, device="cpu")
SIZES = (4, 5, 6)


class Benchmark:
    """What a test is given by pytest-benchmark, and what it was told."""

    def __init__(self) -> None:
        self.group = self.name = ""
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target: Any, *, setup: Any, rounds: int) -> None:
        self.rounds = rounds


def runner() -> tuple[Runner, list[str]]:
    said: list[str] = []
    return Runner(SETTING, 60.0, said.append, lambda: None), said


def case(measure: Any, contenders: tuple[str, ...] = ("released", PACKAGE)) -> Case:
    return Case("kernels", "warp", contenders, measure, SIZES, baseline="released")


def both(outcome: Outcome) -> Any:
    return lambda rounds: Measured({"released": Outcome(seconds=[1.0]), PACKAGE: outcome})


def test_a_case_is_measured_once_for_all_its_contenders() -> None:
    asked: list[int] = []

    def measure(rounds: int) -> Measured:
        asked.append(rounds)
        return Measured({name: Outcome(seconds=[1.0, 2.0]) for name in ("released", PACKAGE)})

    run, said = runner()
    for name in ("released", PACKAGE):
        benchmark = Benchmark()
        run.play(case(measure), name, benchmark)
        assert benchmark.rounds == 2
        assert benchmark.group == "kernels: warp, fp32, 1x4x5x6"
        assert benchmark.name == name
    assert asked == [SETTING.rounds]
    assert len(said) == 1


def test_every_case_is_kept_as_soon_as_it_is_measured() -> None:
    kept: list[int] = []
    run = Runner(SETTING, 60.0, lambda line: None, lambda: kept.append(len(run.measured)))
    for name in ("one", "two"):
        compared = replace(case(both(Outcome(seconds=[1.0]))), name=name)
        for contender in compared.contenders:
            run.outcome(compared, contender)
    assert kept == [1, 2]


def test_what_is_wrong_of_ours_fails_and_has_no_rounds() -> None:
    run, _ = runner()
    benchmark = Benchmark()
    with pytest.raises(pytest.fail.Exception, match="wrong: off by 3"):
        run.play(case(both(Outcome("wrong", "off by 3"))), PACKAGE, benchmark)
    assert benchmark.rounds == 0


def test_a_peer_that_fails_is_passed_over() -> None:
    run, _ = runner()
    outcomes = {PACKAGE: Outcome(seconds=[1.0]), "monai": Outcome("failed", "no such call")}
    compared = case(lambda rounds: Measured(outcomes), (PACKAGE, "monai"))
    with pytest.raises(pytest.skip.Exception, match="monai: failed: no such call"):
        run.play(compared, "monai", Benchmark())


@pytest.mark.parametrize(
    ("error", "status"), [(LeftOut("no such file"), "left out"), (OSError("full"), "failed")]
)
def test_a_case_that_cannot_be_measured_says_why(error: Exception, status: str) -> None:
    def measure(rounds: int) -> Measured:
        raise error

    run, _ = runner()
    outcome = run.outcome(case(measure), PACKAGE)
    assert outcome.status == status
    assert str(error) in outcome.why


def test_a_case_for_which_no_time_is_left_is_not_begun() -> None:
    said: list[str] = []
    run = Runner(replace(SETTING, small=False), 60.0, said.append, lambda: None)
    asked = case(both(Outcome(seconds=[1.0])))
    assert run.outcome(asked, PACKAGE).status == "timed"
    long = replace(asked, name="all night", about_seconds=61.0)
    outcome = run.outcome(long, PACKAGE)
    assert outcome.status == "left out"
    assert "it takes about 61 s, of 1 minutes" in outcome.why
    assert len(said) == 1


def test_the_clock_tells_the_rounds_exactly() -> None:
    seconds = [0.1, 1e-6, 1e9 / 3]
    clock = Playback()
    clock.load(seconds)
    told = []
    for _ in seconds:
        clock.rewind()
        start = clock()
        clock.play()
        told.append(clock() - start)
    assert told == seconds


def test_contenders_run_in_turn() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return 1.0

    found = interleaved({"a": partial(run, "a"), "b": partial(run, "b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert found == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_rounds_that_time_does_not_allow_are_left_out() -> None:
    found = interleaved({"a": lambda: 1.0}, 100, seconds=0.0)
    assert len(found["a"]) == LEAST


def test_a_kernel_that_is_wrong_is_not_timed() -> None:
    # The truth is the op itself in float64, so only what float32 runs may be spoilt.
    def call(*inputs: torch.Tensor) -> Any:
        found = OPS["warp"].call(*inputs)
        return found + 0.1 if inputs[0].dtype == torch.float32 else found

    wrong = kernels.measured(kernels.Row(call, OPS["warp"].make), SIZES, 1, 2)
    assert wrong.outcomes[PACKAGE].status == "wrong"
    assert not wrong.outcomes[PACKAGE].seconds
    right = kernels.measured(kernels.Row(OPS["warp"].call, OPS["warp"].make), SIZES, 1, 2)
    assert right.outcomes[PACKAGE].status == "timed"
    assert len(right.outcomes[PACKAGE].seconds) == 2
    assert right.bytes == 4 * 120 * (1 + 3 + 1)


def test_a_network_that_is_wrong_is_not_timed() -> None:
    truth = [torch.zeros(1, 1, *SIZES), torch.zeros(1, 3, *SIZES)]
    for name, off, wrong in (
        ("ulae_rt fp32", 2e-3, True),
        ("ulae_rt fp32", 5e-4, False),
        ("ulae_rt bf16", 0.1, False),
        ("ulae_rt bf16", 2.0, True),
        ("ulae_rt fp32", float("nan"), True),
    ):
        found = [truth[0], truth[1] + off]
        _, why = network.verdict(name, found, truth)
        assert bool(why) == wrong, (name, off)


def test_flops_of_the_network_are_fewer_than_the_released_codes() -> None:
    state = network.weights("paper")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain.register(state, *network.images(network.SMALL, 1, "cpu"))
    voxels = math.prod(FULL) / math.prod(network.SMALL)
    # By hand, 370.7 GFLOP as released; 311.3 of them are needed, with one block folded at export.
    assert counter.get_total_flops() * voxels == pytest.approx(370.7e9, rel=2e-3)
    assert 311e9 < network.flops("paper", FULL) < 330e9
