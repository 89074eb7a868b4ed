"""Runs a suite's cases under pytest: each is measured once, and each contender's rounds are told.

pytest-benchmark times one function after another; contenders that are to be compared must be timed
in turn. So a case takes its rounds itself, and then plays them to pytest-benchmark's clock: its
statistics, tables, files and comparisons are of those very rounds.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from harness.case import Case, LeftOut, Measured, Outcome, Setting
from harness.machine import ceilings


class Playback:
    """A clock that has seen it all before: of each round it tells the seconds that it took."""

    __name__ = "playback"

    def __init__(self) -> None:
        self._now = 0.0
        self._rounds: Iterator[float] = iter(())

    def load(self, seconds: list[float]) -> None:
        """The rounds that are played."""
        self._rounds = iter(seconds)

    def rewind(self) -> None:
        """A round begins at zero, so that its seconds are not rounded."""
        self._now = 0.0

    def play(self) -> None:
        """A round passes; after the last one, none does."""
        self._now = next(self._rounds, 0.0)

    def __call__(self) -> float:
        """Seconds since the round began."""
        return self._now


CLOCK = Playback()


class Runner:
    """Measures cases, each once, as long as there is time.

    Args:
        setting: of the run.
        seconds: for all cases together.
        tell: shows a line to who waits.
        keep: called after every case, so that what was measured outlives a run that is killed.

    Attributes:
        measured: cases and what came of them, by id.
        left_out: suites that this machine cannot run, and why.
        ceilings: see `harness.machine.ceilings`; measured before the first case.
    """

    def __init__(
        self,
        setting: Setting,
        seconds: float,
        tell: Callable[[str], None],
        keep: Callable[[], object],
    ) -> None:
        self.setting = setting
        self.measured: dict[str, tuple[Case, Measured]] = {}
        self.left_out: dict[str, str] = {}
        self.ceilings: tuple[float, dict[str, float]] = (0.0, {})
        self._seconds = seconds
        self._tell = tell
        self._keep = keep
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the first case could begin."""
        return time.monotonic() - self._started

    def outcome(self, case: Case, contender: str) -> Outcome:
        """What came of a contender; measures the case where that has not been done."""
        if case.id not in self.measured:
            self.measured[case.id] = case, self._measure(case)
            self._keep()
        return self.measured[case.id][1].outcomes[contender]

    def _measure(self, case: Case) -> Measured:
        if not self.measured:
            self.ceilings = ceilings(torch.device(self.setting.device))
        left = self._seconds - self.spent
        if not self.setting.small and case.about_seconds > left:
            why = (
                f"it takes about {case.about_seconds:.0f} s, of {self._seconds / 60:g} minutes "
                f"{max(left, 0):.0f} s were left (--benchmark-minutes)"
            )
            return _all(case, Outcome("left out", why))
        self._tell(f"{case.id} ...")
        try:
            measured = case.measure(self.setting.rounds)
        except LeftOut as error:
            return _all(case, Outcome("left out", str(error)))
        except Exception as error:  # the other cases are still worth the machine's time
            return _all(case, Outcome("failed", f"{type(error).__name__}: {error}"))
        assert set(measured.outcomes) == set(case.contenders), "a contender without an outcome"
        return measured

    def play(self, case: Case, contender: str, benchmark: Any) -> None:
        """Let pytest-benchmark have a contender's rounds, or the test end as the contender did."""
        outcome = self.outcome(case, contender)
        if outcome.status in ("failed", "wrong") and contender in case.own:
            pytest.fail(f"{contender}: {outcome.status}: {outcome.why}", pytrace=False)
        if outcome.status != "timed":
            pytest.skip(f"{case.suite}, {contender}: {outcome.status}: {outcome.why}")
        benchmark.group = case.id
        benchmark.name = contender
        benchmark.extra_info |= {
            name: value
            for name, value in (
                ("error", outcome.error),
                ("peak_gb", outcome.peak_gb),
                ("gpu_peak_gb", outcome.gpu_peak_gb),
                ("first_seconds", outcome.first_seconds),
            )
            if value is not None
        }
        CLOCK.load(outcome.seconds)
        benchmark.pedantic(CLOCK.play, setup=CLOCK.rewind, rounds=len(outcome.seconds))


def _all(case: Case, outcome: Outcome) -> Measured:
    return Measured(dict.fromkeys(case.contenders, outcome))
