"""Registers what ``pytest --benchmark`` does, and hands it to the tests."""

import pytest

from harness.plugin import Benchmarks
from harness.runner import Runner

_NAME = "benchmarks of ulae_rt"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Benchmarks(config), _NAME)


@pytest.fixture
def runner(pytestconfig: pytest.Config) -> Runner:
    benchmarks: Benchmarks = pytestconfig.pluginmanager.getplugin(_NAME)
    return benchmarks.runner
