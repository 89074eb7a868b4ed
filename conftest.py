"""``pytest --benchmark``: its options; what it does stands in bench/conftest.py."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
BENCH = ROOT / "bench"
# In this order: where time is short, other packages on whole files, the longest, are left out.
SUITES = ("network", "engines", "training", "kernels", "scaling", "files")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Beside pytest-benchmark's own."""
    group = parser.getgroup("benchmarks of ulae_rt")
    group.addoption(
        "--benchmark", nargs="?", const=",".join(SUITES), metavar="SUITE[,SUITE...]",
        help=f"run the benchmarks and nothing else: all that this machine can, or of "
        f"{', '.join(SUITES)} those named; -k chooses among their cases",
    )  # fmt: skip
    group.addoption(
        "--benchmark-sizes", choices=("full", "small"), default="full",
        help="full: what people register, reported under bench/results; small: whether it runs, "
        "reported under build/benchmark (%(default)s)",
    )  # fmt: skip
    group.addoption(
        "--benchmark-minutes", type=float, metavar="N",
        help="begin no case that would take longer (14; with a GPU 7.5)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Without files named, `--benchmark` is about the benchmarks alone."""
    asked = config.getoption("benchmark")
    if asked is None:
        return
    unknown = [name for name in asked.split(",") if name not in SUITES]
    if unknown:
        raise pytest.UsageError(
            f"--benchmark has the suite {unknown[0]!r}, expected of {', '.join(SUITES)}; write "
            "--benchmark=SUITE with = where a path follows"
        )
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install -e '.[bench]'")
    if config.args_source != pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCH)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Plain pytest runs no benchmark, whatever folder it is given."""
    outside = collection_path != BENCH and BENCH not in collection_path.parents
    return None if outside or config.getoption("benchmark") is not None else True
