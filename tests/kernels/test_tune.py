"""What ``bench/tune.py`` does without a GPU: choose candidates, write lines, say what it needs."""

import math
import sys

import pytest
import torch
import tune

from ulae_rt.kernels import _configs
from ulae_rt.kernels._configs import TABLE, LaunchConfig, Line


@pytest.mark.parametrize("name", sorted(TABLE))
def test_candidates_of_every_kernel_can_be_launched(name: str) -> None:
    current = TABLE[name][-1].config
    found = tune.candidates(current, steps=1)
    assert found[0] == current
    assert len(set(found)) == len(found) >= 6
    for config in found:
        assert all(size & (size - 1) == 0 for size in config.tile)
        assert 1 <= math.prod(config.tile) / (32 * config.warps) <= tune.MOST_ELEMENTS
    assert set(found) < set(tune.candidates(current, steps=2))


def test_every_kernel_has_a_call_that_launches_it() -> None:
    assert set(tune.jobs(tune.GRIDS[0], "meta")) == set(TABLE)


def test_lines_are_the_tables_own() -> None:
    config = LaunchConfig(tile=(8, 32), warps=4)
    names = {"Line": Line, "LaunchConfig": LaunchConfig}
    (large,) = eval(tune.line(config, tune.GRIDS[0], 4, 90), names)
    assert large == Line(config, itemsize=4, archs=(90,))
    (small,) = eval(tune.line(config, tune.GRIDS[1], 2, 80), names)
    assert small == Line(config, width_at_most=80, itemsize=2, archs=(80,))


def test_the_table_is_as_before_after_a_candidate() -> None:
    before = dict(TABLE)
    config = LaunchConfig(tile=(2, 64), warps=2)
    with tune.using("warp_forward", config):
        assert _configs.launch_config("warp_forward", 160, torch.float32, 90) == config
    assert before == TABLE


def test_a_wrong_result_is_seen() -> None:
    truth = torch.tensor([100.0, 1.0])
    assert tune.wrong([truth + 1e-4], [truth]) == ""
    assert tune.wrong([truth + 1], [truth]).startswith("off by 1.0e-02")
    assert tune.wrong([truth * torch.nan], [truth])


def test_a_dry_run_lists_and_a_run_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune.py", "warp_forward", "--dry-run"])
    assert tune.main() == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("warp_forward, 160x192x160, sm_90: ")
    assert lines[0].startswith("  Line(LaunchConfig(tile=(")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    assert tune.main() == 1
    assert "needs a CUDA device" in capsys.readouterr().err
