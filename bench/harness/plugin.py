"""``pytest --benchmark``: cases become tests, and what came of them a record and its pages."""

import contextlib
import datetime
import importlib
import shlex
import sys
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from harness import machine
from harness.case import Case, LeftOut, Outcome, Setting
from harness.checkout import commit
from harness.record import RESULTS, ROOT, CaseRecord, Record, results_folder
from harness.runner import Runner
from report.make import write_report

# What is small says nothing worth keeping.
SMALL_RESULTS = ROOT / "build" / "benchmark"
MINUTES = {"cuda": 7.5, "cpu": 14.0}
GPU_ORDER = ("kernels", "network", "training", "scaling", "engines", "files")


class Benchmarks:
    """The hooks of a run; registered where the benchmarks are collected."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._started = datetime.datetime.now(datetime.UTC)
        disabled = config.getoption("benchmark_disable") and not config.getoption(
            "benchmark_enable"
        )
        setting = Setting(
            config.getoption("benchmark_sizes") == "small",
            1 if disabled else config.getoption("benchmark_min_rounds"),
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        minutes = config.getoption("benchmark_minutes") or MINUTES[setting.device]
        self.runner = Runner(setting, 60 * minutes, self._tell, self._write_record)
        try:
            self._commit = commit()
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        self._path: Path | None = None
        self._earlier: Record | None = None
        self._written: list[Path] = []

    def _tell(self, line: str) -> None:
        """Show a line while tests run, whose own output is kept from the terminal."""
        capture = self._config.pluginmanager.getplugin("capturemanager")
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        shown = capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
        with shown:
            reporter.ensure_newline()
            reporter.write_line(line)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test for every contender of every case of the suites that were asked for."""
        found: list[tuple[Case, str]] = []
        names = self._config.getoption("benchmark").split(",")
        if self.runner.setting.device == "cuda":
            # What a GPU is there to show; building engines alone would take the time.
            names.sort(key=GPU_ORDER.index)
        for name in names:
            suite = importlib.import_module(f"suites.{name}")
            try:
                for case in suite.cases(self.runner.setting):
                    found += [(case, contender) for contender in case.contenders]
            except LeftOut as error:
                self.runner.left_out[name] = str(error)
        ids = [f"{case.id}, {contender}" for case, contender in found]
        metafunc.parametrize("case,contender", found, ids=ids)

    def pytest_benchmark_update_machine_info(
        self, config: pytest.Config, machine_info: dict[str, Any]
    ) -> None:
        """pytest-benchmark's own files know the processor only."""
        machine_info["ulae_rt"] = {**self._machine, "versions": self._versions}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report of what was measured, also of a run that was stopped in the middle."""
        if not self.runner.measured:
            return
        path = self._write_record()
        self._written = [path, *write_report(path)]

    def _write_record(self) -> Path:
        """Write what has been measured so far; where it lies."""
        record = self._record()
        if self._path is None:
            usual = SMALL_RESULTS if self.runner.setting.small else RESULTS
            self._path = results_folder(usual) / f"{record.stem}.json"
            with contextlib.suppress(OSError, ValueError):  # none is there yet, or it is damaged
                self._earlier = Record.read(self._path)
        if self._earlier is not None:
            record = record.with_earlier(self._earlier)
        record.write(self._path)
        return self._path

    @cached_property
    def _machine(self) -> dict[str, Any]:
        return machine.facts()

    @cached_property
    def _versions(self) -> dict[str, str | None]:
        return machine.versions()

    def _record(self) -> Record:
        return Record(
            machine=self._machine,
            versions=self._versions,
            started=self._started.isoformat(timespec="seconds"),
            commit=self._commit[0],
            dirty=self._commit[1],
            command=shlex.join(["pytest", *sys.argv[1:]]),
            small=self.runner.setting.small,
            seconds=self.runner.spent,
            copy_bytes_per_second=self.runner.ceilings[0],
            matmul_flops_per_second=self.runner.ceilings[1],
            cases=[CaseRecord.of(*each) for each in self.runner.measured.values()],
            left_out=self.runner.left_out,
        )

    @pytest.hookimpl(trylast=True)  # after the tables of pytest-benchmark
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table and where the report is."""
        if not self._written:
            return
        terminalreporter.section("benchmarks")
        for case, measured in self.runner.measured.values():
            base = measured.outcomes.get(case.baseline)
            terminalreporter.write_line(case.id)
            for name in case.contenders:
                terminalreporter.write_line(f"    {_line(name, measured.outcomes[name], base)}")
        for name, why in self.runner.left_out.items():
            terminalreporter.write_line(f"{name}: left out: {why}")
        for path in self._written:
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            terminalreporter.write_line(f"written: {shown}")


def _line(name: str, outcome: Outcome, base: Outcome | None) -> str:
    if outcome.status != "timed":
        return f"{name:<32}{outcome.status}: {outcome.why}"
    seconds = outcome.seconds
    text = (
        f"{name:<32}{_time(median(seconds)):>12}   {_time(min(seconds))} to {_time(max(seconds))}"
    )
    if base is not None and base is not outcome and base.status == "timed":
        text += f"   {median(base.seconds) / median(seconds):.2f} x as fast"
    return text


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
