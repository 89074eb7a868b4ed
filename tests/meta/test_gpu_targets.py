"""``make test-gpu`` and ``make bench-gpu`` need no more than torch, triton, numpy and pytest."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from _support.project import ROOT, imports

# Jinja2 and MarkupSafe come with torch, which needs them.
HAS = {"jinja2", "markupsafe", "numpy", "pytest", "torch", "triton"} | set(sys.stdlib_module_names)
BENCH = sorted((ROOT / "bench").rglob("*.py"))
OWN = {"_support", "baselines", "harness", "report", "suites", "ulae_rt"}
TESTS = ROOT / "tests"


def selected() -> list[Path]:
    """The test modules that ``make test-gpu`` names."""
    done = subprocess.run(
        ["make", "--dry-run", "test-gpu"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = re.findall(r"tests/\S+\.py", done.stdout)
    return [ROOT / name for name in names]


def support(sources: list[Path]) -> list[Path]:
    """What ``sources`` import of ``_support``, and what that imports of it."""
    found: list[Path] = []
    waiting = list(sources)
    while waiting:
        for entry in imports(waiting.pop().read_text()):
            file = TESTS / (entry.module.replace(".", "/") + ".py")
            if entry.module.startswith("_support.") and file.is_file() and file not in found:
                found.append(file)
                waiting.append(file)
    return found


def missing(file: Path) -> set[str]:
    """What importing ``file`` needs and the machine has not."""
    eager = {entry.module.split(".")[0] for entry in imports(file.read_text()) if entry.eager}
    return eager - HAS - OWN


def test_every_module_that_tests_kernels_is_selected() -> None:
    testing = {
        file for file in TESTS.glob("kernels/test_*.py") if "triton_device" in file.read_text()
    }
    assert testing <= set(selected())


def test_what_is_selected_imports_there() -> None:
    files = [*selected(), TESTS / "conftest.py", TESTS / "kernels" / "conftest.py"]
    assert len(files) > 5
    needed = {file.name: missing(file) for file in [*files, *support(files)]}
    assert not {name: modules for name, modules in needed.items() if modules}


@pytest.mark.parametrize("file", BENCH, ids=lambda file: file.stem)
def test_benchmarks_import_there(file: Path) -> None:
    assert not {each.name: missing(each) for each in [file, *support([file])] if missing(each)}
