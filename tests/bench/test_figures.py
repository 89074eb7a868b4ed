"""Figures against values that were worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.case import Outcome
from harness.record import CaseRecord, Record
from report.figures import (
    exponent,
    figures,
    floor,
    headline_cases,
    mean,
    own_by_precision,
    percentile,
    precision_of,
    quartiles,
    times_as_fast,
    untimed,
)

Make = Callable[..., CaseRecord]


@pytest.mark.parametrize(
    ("number", "p95", "p99"),
    [(19, False, False), (20, True, False), (99, True, False), (100, True, True)],
)
def test_a_percentile_needs_rounds(number: int, p95: bool, p99: bool) -> None:
    values = [float(n) for n in range(number)]
    assert (percentile(values, 95) is not None) == p95
    assert (percentile(values, 99) is not None) == p99
    assert percentile(values, 50) == (number - 1) / 2


def test_percentiles_and_quartiles_lie_between_rounds() -> None:
    values = [float(n) for n in range(101)]
    assert percentile(values, 95) == 95
    assert percentile(values, 99) == 99
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_a_ratio_is_taken_within_a_round() -> None:
    # Medians 2 and 30 would say 15; round by round it is 10, 20 and 10.
    assert times_as_fast([1.0, 2.0, 3.0], [10.0, 40.0, 30.0]) == 10
    # Of unequal numbers of rounds no two belong together.
    assert times_as_fast([1.0, 2.0, 3.0], [10.0, 40.0]) == 12.5


@pytest.mark.parametrize(
    ("name", "precision"),
    [("ulae_rt bf16", "bf16"), ("ulae_rt", "fp32"), ("released, TF32", "tf32"),
     ("fp16 in, fp32 inside", "fp32"), ("sfp16x", "fp32")],
)  # fmt: skip
def test_precision_is_named_or_the_cases(name: str, precision: str, make_case: Make) -> None:
    assert precision_of(make_case("one", {}), name) == precision


def test_the_floor_is_the_larger_bound(gpu: Record, make_case: Make) -> None:
    ceilings = replace(gpu, copy_bytes_per_second=1e12, matmul_flops_per_second={"fp32": 1e13})
    moves = make_case("moves", {}, bytes=10**9, flops=1e9)
    computes = make_case("computes", {}, bytes=10**6, flops=1e12)
    assert floor(ceilings, moves, "fp32") == 1e-3
    assert floor(ceilings, computes, "fp32") == 0.1
    assert floor(ceilings, computes, "bf16") == 0.1  # no rate of its own: that of fp32
    assert floor(gpu, computes, "bf16") == 1e12 / 7.6e14
    assert floor(gpu, make_case("neither", {}), "fp32") is None
    assert floor(replace(gpu, copy_bytes_per_second=0.0), moves, "fp32") == 1e9 / 5e13


def test_the_figures_of_a_contender(gpu: Record, make_case: Make) -> None:
    contenders = {
        "released": Outcome(seconds=[0.4, 0.5, 0.6]),
        "ulae_rt": Outcome(seconds=[0.1, 0.1, 0.3], hot=[0.05, 0.06, 0.07]),
        "peer": Outcome("failed", "no"),
        "empty": Outcome(),
    }
    case = make_case("one", contenders, batch=2, bytes=2 * 10**9)
    record = replace(gpu, copy_bytes_per_second=4e10)
    found = figures(record, case, "ulae_rt")
    assert found is not None
    assert (found.rounds, found.median, found.low, found.high) == (3, 0.1, 0.1, 0.3)
    assert (found.p95, found.p99, found.hot) == (None, None, 0.06)
    assert found.times == pytest.approx(4.0)
    assert found.pairs_per_second == 20
    assert found.bytes_per_second == 2e10
    assert found.copy_share == 0.5
    assert found.floor == 0.05
    assert found.floors == 2
    base = figures(record, case, "released")
    assert base is not None
    assert base.times is None
    assert figures(record, case, "peer") is None
    assert figures(record, case, "empty") is None


def test_without_a_timed_baseline_there_is_no_ratio(gpu: Record, make_case: Make) -> None:
    own = Outcome(seconds=[1.0])
    for baseline, contenders in (
        ("released", {"ulae_rt": own, "released": Outcome("wrong", "off")}),
        ("released", {"ulae_rt": own}),
        ("", {"ulae_rt": own}),
    ):
        found = figures(gpu, make_case("one", contenders, baseline=baseline), "ulae_rt")
        assert found is not None
        assert found.times is None


def test_the_exponent_of_an_exact_power() -> None:
    fit = exponent([(x, 3.0 * x**1.5) for x in (1.0, 2.0, 4.0, 9.0)])
    assert fit is not None
    assert fit.exponent == pytest.approx(1.5)
    assert fit.constant == pytest.approx(3.0)
    assert fit.error == pytest.approx(0.0, abs=1e-9)


def test_the_error_of_an_exponent() -> None:
    # log2 x is 0, 1, 2 and log2 y is 0, 1 + a, 2: the slope is 1, the residuals are
    # -a/3, 2a/3, -a/3, so their squares' sum is 2a²/3, on one degree of freedom, over 2.
    a = 0.3
    fit = exponent([(1.0, 1.0), (2.0, 2 ** (1 + a)), (4.0, 4.0)])
    assert fit is not None
    assert fit.exponent == pytest.approx(1.0)
    assert fit.error == pytest.approx(a / math.sqrt(3))


def test_an_exponent_needs_three_sizes() -> None:
    assert exponent([(1.0, 1.0), (2.0, 2.0)]) is None
    assert exponent([(1.0, 1.0), (1.0, 1.1), (2.0, 2.0), (2.0, 2.2)]) is None


def test_the_cases_precision_may_have_more_words(make_case: Make) -> None:
    assert precision_of(make_case("one", {}, precision="fp32 images"), "released") == "fp32"
    assert precision_of(make_case("one", {}, precision="fp32 images"), "ulae_rt bf16") == "bf16"
    assert precision_of(make_case("one", {}, precision="int4"), "released") == "int4"


def test_a_headline_is_the_largest_of_one_pair_and_the_largest_batch(
    gpu: Record, make_case: Make
) -> None:
    def case(name: str, **fields: object) -> CaseRecord:
        return make_case(name, {"ulae_rt": Outcome(seconds=[1.0])}, **fields)

    cases = [
        case("small", sizes=(8, 8, 8)), case("no baseline", baseline=""), case("full"),
        case("other"), case("against a peer", baseline="peer"), case("two", batch=2),
        case("eight", batch=8),
    ]  # fmt: skip
    found = headline_cases(replace(gpu, cases=cases), "network")
    assert [each.name for each in found] == ["full", "against a peer", "eight"]


def test_a_case_without_baseline_stands_for_a_suite_that_has_no_other(
    gpu: Record, make_case: Make
) -> None:
    broken = make_case("broken", {"ulae_rt": Outcome("failed", "no")}, baseline="")
    works = make_case("works", {"ulae_rt": Outcome(seconds=[1.0])}, baseline="")
    assert headline_cases(replace(gpu, cases=[broken, works]), "network") == [works]
    assert headline_cases(replace(gpu, cases=[broken]), "network") == [broken]


def test_of_the_package_the_fastest_of_each_precision(gpu: Record, make_case: Make) -> None:
    seconds = {"a fp32": 3.0, "b fp32": 2.0, "c bf16": 4.0, "d fp16": 1.0, "e fp64": 9.0}
    contenders = {name: Outcome(seconds=[value]) for name, value in seconds.items()}
    contenders |= {"released": Outcome(seconds=[8.0]), "f fp8": Outcome("wrong", "off")}
    case = make_case("one", contenders, own=tuple(contenders))
    assert list(own_by_precision(gpu, case)) == ["d fp16", "b fp32", "c bf16"]


def test_the_mean_of_kernels(gpu: Record, make_case: Make) -> None:
    def case(name: str, own: Outcome, baseline: float) -> CaseRecord:
        contenders = {"ulae_rt": own, "released": Outcome(seconds=[baseline])}
        return make_case(name, contenders, suite="kernels", bytes=10**9)

    cases = [
        case("one", Outcome(seconds=[1e-3], gpu_peak_gb=2.0), 2e-3),
        case("two", Outcome(seconds=[2e-3], gpu_peak_gb=3.0), 16e-3),
        case("three", Outcome("wrong", "off"), 1.0),
    ]
    found = mean(replace(gpu, cases=cases, copy_bytes_per_second=1e12), "kernels")
    assert found is not None
    assert found.times == pytest.approx(4.0)
    assert (found.least, found.most) == (2.0, 8.0)
    assert (found.compared, found.cases, found.baselines) == (2, 3, ("released",))
    assert found.floors == 1.5
    assert found.peak_gb == 3.0
    assert mean(replace(gpu, cases=cases[2:]), "kernels") is None


def test_what_has_no_time_is_listed_worst_first(gpu: Record) -> None:
    found = [outcome.status for _, _, outcome in untimed(gpu)]
    assert found == ["wrong", "failed", *["left out"] * 16]
