"""Kernels compiled without a GPU are found again where their folder was carried to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from _support.project import ROOT
from harness import carried

pytest.importorskip("triton")

COMPILE = """
import json, os, sys
from functools import partial
from pathlib import Path
import cubins
from harness import carried
from triton import knobs
if sys.argv[1] == "mended":
    carried.use(Path(os.environ["TRITON_CACHE_DIR"]))
hits = []
knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
chosen = [case for case in cubins.resources.cases() if case.name in ("compose", "diffusion")]
new = cubins.compile_forms([(case.name, partial(case.run, False)) for case in chosen], 90)
print(json.dumps({"hits": hits, "kernels": new.kernels}))
"""


def compiled(cache: Path, how: str) -> dict[str, Any]:
    place = f"{ROOT / 'bench'}:{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": place, "TRITON_CACHE_DIR": str(cache)}
    for name in ("TRITON_INTERPRET", "ULAE_RT_KERNELS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE, how], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_cache_that_was_moved_is_used(tmp_path: Path) -> None:
    first, second = tmp_path / "here", tmp_path / "there"
    built = compiled(first, "as it is")
    assert built["hits"] == [False, False, False]
    assert built["kernels"]["compose"] == ["_compose_forward_kernel"]
    assert list(first.rglob("*.cubin"))
    kept = carried.folders(first)
    first.rename(second)
    assert compiled(second, "mended")["hits"] == [True, True, True]
    assert carried.folders(second) == kept
    # Its files are where Triton wrote that they are, so that another move spoils it again.
    second.rename(first)
    assert compiled(first, "as it is")["hits"] == [False, False, False]


def test_what_is_damaged_or_not_there_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "another")
    assert carried.use(tmp_path / "nothing") == 0
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "nothing")
    for number, text in enumerate(("", "[]", "{}", '{"child_paths": 3}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "__grp__kernel.json").write_text(text)
    assert carried.use(tmp_path) == 4
    assert len(carried.folders(tmp_path)) == 4


def test_the_key_says_whether_the_kernels_are_of_use(tmp_path: Path) -> None:
    assert "FileNotFoundError" in carried.compared(tmp_path, 90)["why"]
    here = carried.key(90)
    (tmp_path / carried.KEY).write_text(json.dumps(here))
    same = carried.compared(tmp_path, 90)
    assert (same["same"], same["differ"]) == (True, [])
    (tmp_path / carried.KEY).write_text(json.dumps({**here, "ptxas": "another"}))
    other = carried.compared(tmp_path, 80)
    assert (other["same"], other["differ"]) == (False, ["ptxas", "arch"])
    (tmp_path / carried.KEY).write_text("[]")
    assert not carried.compared(tmp_path, 90)["same"]
