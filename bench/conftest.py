"""Options of the benchmarks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=("full", "small"),
        default="full",
        help="full: 160x192x160, recorded under bench/results; small: a smoke test, not recorded",
    )
    parser.addoption("--rounds", type=int, default=5, help="how often each contender is timed")
    parser.addoption("--rows", default="", help="of the ops, only those with this in their name")
    parser.addoption(
        "--profile", action="store_true", help="list the kernels a training step spends its time in"
    )


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--sizes") == "full")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))
