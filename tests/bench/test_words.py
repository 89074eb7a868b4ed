"""Figures as people read them."""

from collections.abc import Callable

import pytest

from report import words


@pytest.mark.parametrize(
    ("say", "value", "said"),
    [
        (words.digits, 1234.5, "1,230"),
        (words.digits, 99.96, "100"),
        (words.digits, 9.996, "10.0"),
        (words.digits, 0.3, "0.300"),
        (words.digits, 0.0, "0"),
        (words.seconds, 24.9e-6, "24.9 µs"),
        (words.seconds, 0.4567, "457 ms"),
        (words.seconds, 10.12, "10.1 s"),
        (words.seconds, 0.0, "0 s"),
        (words.duration, 59.0, "59 s"),
        (words.duration, 1834.0, "30 min 34 s"),
        (words.duration, 7260.0, "2 h 1 min"),
        (words.times, 4.96, "5.0×"),
        (words.times, 9.96, "10×"),
        (words.times, 0.334, "0.33×"),
        (words.bandwidth, 4.3e12, "4.30 TB/s"),
        (words.arithmetic, 2.6e11, "260 GFLOP/s"),
        (words.work, 311.3e9, "311 GFLOP"),
        (words.size, 98_304_000, "98.3 MB"),
        (words.size, 20_480, "20.5 kB"),
        (words.percent, 0.917, "92 %"),
        (words.percent, 0.0049, "0.5 %"),
        (words.error, 3.07e-5, "3.1e-05"),
        (words.error, 0.2888, "0.29"),
    ],
)
def test_a_figure(say: Callable[[float], str], value: float, said: str) -> None:
    assert say(value) == said


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.062, 0.0673, "62.0 to 67.3 ms"),
        (0.97, 1.17, "970 ms to 1.17 s"),
        (1e-5, 1e-3, "10.0 µs to 1.00 ms"),
    ],
)
def test_a_unit_is_said_once(low: float, high: float, said: str) -> None:
    assert words.span(low, high) == said


def test_a_precision_is_said_once() -> None:
    assert words.case("warp", "fp32") == "warp, fp32"
    assert words.case("warp, fp16 image", "fp16") == "warp, fp16 image"


def test_several_pairs_are_said() -> None:
    assert words.volume((160, 192, 160), 1) == "160×192×160"
    assert words.volume((8, 8, 8), 4) == "4 pairs of 8×8×8"
