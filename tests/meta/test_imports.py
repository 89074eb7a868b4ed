"""Importing is cheap and without effect."""

import subprocess
import sys

import pytest

from _support.project import modules

# Run before the import under test: the first touch of a device raises.
NO_CUDA = """
import torch
def refuse(*arguments, **options):
    raise SystemExit("initialises CUDA")
torch.cuda._lazy_init = torch.cuda.init = torch._C._cuda_init = refuse
"""


def loaded_by(statement: str, before: str = "") -> set[str]:
    """Top-level names that ``statement`` adds to ``sys.modules`` in a fresh process."""
    program = (
        f"import sys\n{before}\nbefore = set(sys.modules)\n{statement}\n"
        "print(*{name for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def third_party(names: set[str]) -> set[str]:
    tops = {name.split(".")[0] for name in names}
    return {name for name in tops if name not in sys.stdlib_module_names} - {"ulae_rt"}


@pytest.mark.parametrize("module", ["ulae_rt", "ulae_rt.cli", "ulae_rt.errors", "ulae_rt.optional"])
def test_the_package_and_its_help_import_nothing_installed(module: str) -> None:
    assert not third_party(loaded_by(f"import {module}"))


def test_engines_import_without_torch_and_without_the_rest_of_the_package() -> None:
    names = loaded_by("import ulae_rt.engines")
    assert not third_party(names) & {"torch", "triton", "onnx", "tensorrt", "tensorrt_rtx"}
    assert not {name for name in names if name.startswith("ulae_rt.")} & {
        name
        for name in modules()
        if name.startswith(("ulae_rt.model", "ulae_rt.kernels", "ulae_rt.export"))
    }


# A command looks at its arguments and its files, and says how threads wait, before torch is loaded.
BEFORE_TORCH = [
    "ulae_rt.baselines.options",
    "ulae_rt.batch",
    "ulae_rt.clock",
    "ulae_rt.imaging.grid",
    "ulae_rt.imaging.nifti",
    "ulae_rt.imaging.scan",
    "ulae_rt.imaging.warpfile",
    "ulae_rt.options",
    "ulae_rt.register",
    "ulae_rt.registration",
    "ulae_rt.registration.network",
    "ulae_rt.registration.outputs",
    *sorted(name for name in modules() if name.startswith("ulae_rt.batching")),
]


@pytest.mark.parametrize("module", BEFORE_TORCH)
def test_what_a_command_looks_at_first_loads_no_torch(module: str) -> None:
    assert not third_party(loaded_by(f"import {module}")) & {"torch", "triton", "matplotlib"}


def test_imaging_imports_without_matplotlib() -> None:
    names = sorted(name for name in modules() if name.startswith("ulae_rt.imaging"))
    assert not third_party(loaded_by(f"import {', '.join(names)}")) & {"triton", "matplotlib"}


@pytest.mark.parametrize("module", ["ulae_rt.kernels", "ulae_rt.model", "ulae_rt.training"])
def test_no_import_initialises_cuda(module: str) -> None:
    loaded_by(f"import {module}", before=NO_CUDA)


def test_kernels_import_without_triton() -> None:
    names = loaded_by("import ulae_rt.kernels, ulae_rt.kernels.resources", before="import torch")
    assert "ulae_rt.kernels.warp.op" in names
    assert "triton" not in third_party(names)


def test_no_import_touches_logging() -> None:
    statement = (
        "import logging, ulae_rt.kernels, ulae_rt.model\n"
        "assert not logging.getLogger('ulae_rt').handlers\n"
        "assert not logging.getLogger().handlers"
    )
    loaded_by(statement, before="import torch")
