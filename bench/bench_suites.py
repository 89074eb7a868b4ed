"""The one test of ``pytest --benchmark``: a contender of a case of a suite."""

from typing import Any

import pytest

from harness.case import Case
from harness.runner import CLOCK, Runner


# A contender's warning must not throw away what was measured.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=CLOCK)
def test_contender(case: Case, contender: str, runner: Runner, benchmark: Any) -> None:
    runner.play(case, contender, benchmark)
