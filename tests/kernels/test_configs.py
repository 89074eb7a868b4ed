"""The table of launch configurations: complete, usable, and a pure function."""

import ast
import math
from collections.abc import Iterator

import pytest
import torch

from _support.project import modules
from ulae_rt.kernels import _configs
from ulae_rt.kernels._configs import TABLE, LaunchConfig, Line, launch_config, march, resident

ARCHITECTURES = (0, 75, 80, 86, 89, 90, 100, 103, 120)
DTYPES = (torch.float16, torch.float32, torch.float64)


def nodes() -> Iterator[ast.AST]:
    """The source of the kernels, without the table itself."""
    for name, file in modules().items():
        if name.startswith("ulae_rt.kernels.") and name != _configs.__name__:
            yield from ast.walk(ast.parse(file.read_text()))


def lines() -> list[tuple[str, Line]]:
    return [(name, line) for name, table in TABLE.items() for line in table]


def test_launchers_ask_for_what_the_table_has() -> None:
    asked = {
        node.args[0].value
        for node in nodes()
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] == "launch_config"
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked
    assert asked <= set(TABLE)


def test_every_entry_of_the_table_is_named_by_a_launcher() -> None:
    # Some choose between two names and pass a variable.
    named = {node.value for node in nodes() if isinstance(node, ast.Constant)}
    assert set(TABLE) <= named


@pytest.mark.parametrize("name", sorted(TABLE))
def test_last_line_alone_has_no_condition(name: str) -> None:
    unconditional = [
        line.width_at_most is None and line.itemsize is None and line.archs is None
        for line in TABLE[name]
    ]
    assert unconditional == [False] * (len(unconditional) - 1) + [True]


@pytest.mark.parametrize(("name", "line"), lines())
def test_tiles_and_warps_are_what_triton_takes(name: str, line: Line) -> None:
    tile, warps = line.config.tile, line.config.warps
    assert tile
    assert all(size > 0 and size & (size - 1) == 0 for size in tile)
    assert warps in (1, 2, 4, 8, 16)
    assert math.prod(tile) <= 2**20  # Triton's limit of a tensor


@pytest.mark.parametrize(("name", "line"), lines())
def test_every_lane_has_work_but_not_too_much(name: str, line: Line) -> None:
    if line.archs == (0,):
        assert line.config.warps == 1  # the interpreter has none
    else:
        lanes = 32 * line.config.warps
        assert lanes <= math.prod(line.config.tile) <= 128 * lanes


@pytest.mark.parametrize("name", sorted(TABLE))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_shape_type_and_architecture_has_one(name: str, arch: int) -> None:
    for dtype in DTYPES:
        for width in (1, 16, 17, 160, 10_000):
            config = launch_config(name, width, dtype, arch)
            assert config == launch_config(name, width, dtype, arch)
            assert config in [line.config for line in TABLE[name]]


def test_first_line_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = (LaunchConfig(tile=(32 << i,), warps=1) for i in range(4))
    table = (
        Line(a, archs=(80, 86)), Line(b, width_at_most=16), Line(c, itemsize=2, archs=(90,)),
        Line(d),
    )  # fmt: skip
    monkeypatch.setitem(_configs.TABLE, "toy", table)
    assert launch_config("toy", 16, torch.float32, 86) == a
    assert launch_config("toy", 16, torch.float16, 90) == b
    assert launch_config("toy", 17, torch.float16, 90) == c
    assert launch_config("toy", 17, torch.float16, 100) == d
    assert launch_config("toy", 17, torch.float32, 90) == d


def test_table_without_a_last_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LaunchConfig(tile=(32,), warps=1)
    monkeypatch.setitem(_configs.TABLE, "toy", (Line(config, archs=(80,)),))
    with pytest.raises(AssertionError, match="last line"):
        launch_config("toy", 1, torch.float32, 90)


def test_programs_at_a_time_by_their_registers() -> None:
    assert resident(128, 4, 90) == 4
    assert resident(121, 4, 90) == 4  # registers come by eights
    assert resident(129, 4, 90) == 3
    assert resident(24, 4, 90) == 16  # no more than 64 warps
    assert resident(255, 16, 90) == 1  # one, however large
    assert resident(56, 4, 90) == 9
    assert resident(56, 1, 0) == 1  # the interpreter


def test_a_march_fills_whole_waves() -> None:
    # 360 programs abreast, nine at a time on each of 132: three stretches of 54 are one wave.
    assert march(160, 64, 360, 132, 9, 4) == 54
    # Where the longest allowed are too many for one wave, two of shorter ones.
    assert march(160, 32, 360, 132, 9, 4) == 27
    # Where programs are few, they are short, so that every multiprocessor has some.
    assert march(160, 64, 2, 132, 9, 4) == 1
    # Where there are many whatever is done, they repeat as little as they can.
    assert march(160, 64, 100_000, 132, 9, 4) == 54
    assert march(1, 64, 7, 1, 3, 1) == 1
    # LNCC's score at window 11 took three blocks: 1,200 programs, three waves and 12 programs.
    assert march(18, 12, 200, 132, 3, 1) == 6


@pytest.mark.parametrize("steps", [1, 2, 7, 15, 160])
@pytest.mark.parametrize("columns", [1, 200, 360, 4000])
def test_a_march_is_one_that_can_be_launched(steps: int, columns: int) -> None:
    for most in (1, 8, 64):
        chosen = march(steps, most, columns, 132, 3, 1)
        assert 1 <= chosen <= min(steps, most)
        assert chosen == march.__wrapped__(steps, most, columns, 132, 3, 1)


def autotuned(source: str) -> bool:
    return any(
        isinstance(node, ast.Name | ast.Attribute)
        and ast.unparse(node).split(".")[-1] == "autotune"
        for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_is_tuned_at_run_time(name: str) -> None:
    assert not autotuned(modules()[name].read_text())


def test_the_guard_sees_autotune() -> None:
    assert autotuned("@triton.autotune(configs=[], key=[])\ndef kernel(): ...")
    assert autotuned("autotune(configs)")
