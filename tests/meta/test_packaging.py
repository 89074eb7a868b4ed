"""What is installed is what is in the repository, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from _support.project import ROOT, folders, modules, pyproject
from ulae_rt import __version__
from ulae_rt.cli import COMMANDS
from ulae_rt.evaluation.protocol import PROTOCOLS


def test_declared_packages_are_the_folders_on_disk() -> None:
    declared = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(folders())


def test_every_package_folder_has_an_init() -> None:
    missing = [name for name, folder in folders().items() if not (folder / "__init__.py").is_file()]
    assert not missing


def test_analysers_see_the_mapped_folders_in_their_place() -> None:
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    for package, folder in mapping.items():
        if package != "ulae_rt":
            link = ROOT / "typings" / package.replace(".", "/")
            assert link.is_symlink()
            assert link.resolve() == ROOT / folder


def test_nothing_asks_for_another_editable_mode() -> None:
    option = "editable" + "_mode="
    for name in ("Makefile", ".ci/run", "README.md", "CONTRIBUTING.md"):
        assert option not in (ROOT / name).read_text()


def test_pinned_versions_cover_what_the_extras_name() -> None:
    pins = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert not [line for line in (ROOT / "constraints.txt").read_text().split() if "+" in line]
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [
        requirement
        for extra in ("baselines", "bench", "dev", "evaluate", "export", "ray", "torch", "train")
        for requirement in extras[extra]
    ]
    names = {re.split(r"[\[<>=;]", requirement)[0].lower() for requirement in wanted}
    assert not names - pins - {"ulae-rt"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="80")
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("ulae_rt", "kernels", "export", "engines", "tests", "bench", "samples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(tree.glob("*.whl")))


def test_wheel_has_every_module_and_no_other(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for name, file in modules().items():
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        expected.add(f"{package.replace('.', '/')}/{file.name}")
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_wheel_has_the_weights_the_marker_and_the_licences(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    weights = [
        f"ulae_rt/model/weights/{file.name}"
        for file in (ROOT / "ulae_rt/model/weights").glob("*")
        if file.suffix in (".safetensors", ".md")
    ]
    protocols = [f"ulae_rt/evaluation/protocols/{name}.toml" for name in PROTOCOLS]
    assert names >= {"ulae_rt/py.typed", *weights, *protocols}
    for licence in ("LICENSE", "NOTICE"):
        assert [name for name in names if name.endswith(f"/licenses/{licence}")]


def test_wheel_has_nothing_but_the_package(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "ulae_rt",
        f"ulae_rt-{__version__}.dist-info",
    }


def test_base_installation_needs_no_torch(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"ulae_rt-{__version__}.dist-info/METADATA").decode()
    base = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert len(base) > 3
    assert not [line for line in base if re.search("torch|nvidia|cuda|triton|gpu", line)]


def outside(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_runs_as_a_module_from_anywhere(command: str, tmp_path: Path) -> None:
    done = outside(sys.executable, "-m", f"ulae_rt.{command}", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m ulae_rt.{command}")


def test_commands_run_from_the_repository_root_too() -> None:
    # There the working directory's ulae_rt/ comes first, and has no kernels/ of its own.
    done = outside(sys.executable, "-m", "ulae_rt", "export", "--help", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_console_script_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("ulae-rt")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = outside(str(script), "--version", cwd=tmp_path)
    assert done.stdout == f"ulae-rt {__version__}\n"
