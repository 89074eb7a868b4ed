"""A plugin for pytest that writes what came of its tests into the evidence, as they end."""

import os
from collections import Counter
from pathlib import Path

import pytest

from harness.evidence import Evidence

# Tests between two rows with the counts so far.
EVERY = 20

_counts: Counter[str] = Counter()


def _evidence() -> Evidence | None:
    folder, stage = os.environ.get("ULAE_RT_EVIDENCE"), os.environ.get("ULAE_RT_STAGE")
    return Evidence(Path(folder), stage) if folder and stage else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that collects the results, where several run the tests."""
    evidence = _evidence()
    if evidence is None or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
        if report.outcome == "failed":
            evidence.add("failed test", test=report.nodeid, why=str(report.longrepr)[-2000:])
        if sum(_counts.values()) % EVERY == 0:
            evidence.add("tests so far", **_counts)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The counts of all."""
    evidence = _evidence()
    if evidence is not None and not os.environ.get("PYTEST_XDIST_WORKER"):
        evidence.add("tests", **_counts)
