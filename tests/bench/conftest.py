"""Records of runs that never were: a CPU's, and a GPU's with all that can come of a contender."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from harness.case import FULL, Outcome
from harness.record import CaseRecord, Record

Make = Callable[..., CaseRecord]
Rounds = Callable[..., list[float]]


@pytest.fixture
def rounds() -> Rounds:
    """(median, number, scatter) to seconds of rounds that lie around it."""

    def make(median: float, number: int = 5, scatter: float = 0.03) -> list[float]:
        return [median * random.uniform(1 - scatter, 1 + scatter) for _ in range(number)]

    return make


@pytest.fixture
def make_case() -> Make:
    """Fields to a case in which everything else is as plain as can be."""

    def make(name: str, contenders: dict[str, Outcome], **fields: Any) -> CaseRecord:
        plain: dict[str, Any] = {
            "suite": "network", "sizes": FULL, "batch": 1, "precision": "fp32",
            "baseline": "released", "own": ("ulae_rt",), "goal": "", "error_unit": "",
            "series": "", "x": None, "bytes": None, "flops": None,
        }  # fmt: skip
        return CaseRecord(name=name, contenders=contenders, **{**plain, **fields})

    return make


def record(machine: dict[str, Any], **fields: Any) -> Record:
    plain: dict[str, Any] = {
        "machine": machine,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "monai": None},
        "started": "2026-11-23T04:10:12+00:00",
        "commit": "0123abcde",
        "dirty": False,
        "command": "pytest --benchmark",
        "small": False,
        "seconds": 1834.0,
        "copy_bytes_per_second": 2e10,
        "matmul_flops_per_second": {"fp32": 2.5e11, "bf16": 2e12},
    }
    return Record(**{**plain, **fields})


@pytest.fixture
def cpu(make_case: Make, rounds: Rounds) -> Record:
    """A CPU: a few rounds, stages, a batch, a series, suites left out."""
    network = {
        "released": Outcome(seconds=rounds(10.0), peak_gb=2.07, error=0.0),
        "ulae_rt fp32": Outcome(seconds=rounds(3.3), peak_gb=1.91, error=3e-5, first_seconds=4.0),
        "ulae_rt bf16": Outcome(seconds=rounds(2.0), peak_gb=1.29, error=0.29),
        "ulae_rt fp16": Outcome("left out", "this processor has no fp16 arithmetic"),
        "peer of another house": Outcome("failed", "RuntimeError: it cannot"),
    }
    stages = {"read": rounds(0.1), "network": rounds(0.8), "write": rounds(2.0)}
    files = {
        "ANTs SyN, as its user calls it, with a name that takes several lines": Outcome(
            seconds=rounds(60.0)
        ),
        "ulae_rt register": Outcome(seconds=rounds(7.0), stages=stages, peak_gb=1.1),
    }
    batch = {
        "one by one": Outcome(seconds=rounds(85.0, 2)),
        "ulae_rt batch": Outcome(seconds=rounds(12.5, 3), peak_gb=1.7),
    }
    cases = [
        make_case(
            "one pair", network, own=("ulae_rt fp32", "ulae_rt bf16", "ulae_rt fp16"),
            flops=3.1e11, bytes=10**9, error_unit="voxel", goal="fp32 2.5 times as fast",
        ),
        make_case(
            "register", files, suite="files", baseline=next(iter(files)), own=("ulae_rt register",)
        ),
        make_case(
            "batch", batch, suite="files", baseline="one by one", own=("ulae_rt batch",), batch=8
        ),
    ]  # fmt: skip
    for side in (32, 48, 64, 96):
        contenders = {
            "released": Outcome(seconds=rounds(2e-6 * side**3)),
            "ulae_rt": Outcome(seconds=rounds(7e-7 * side**3)),
        }
        cases.append(
            make_case(
                f"{side} cubed", contenders, suite="scaling", series="voxels", x=float(side**3),
                sizes=(side,) * 3,
            )
        )  # fmt: skip
    machine = {
        "name": "cpu2-xeon", "title": "Xeon, 2 cores", "cores": 2, "gpu": None, "memory_gb": 25.1
    }  # fmt: skip
    return record(machine, cases=cases, left_out={"kernels": "there is no GPU"})


@pytest.fixture
def gpu(make_case: Make, rounds: Rounds) -> Record:
    """A GPU: many kernels with cold and hot rounds, some wrong or failed, and a long latency."""
    cases = []
    for number in range(16):
        contenders = {
            "ulae_rt": Outcome(
                seconds=rounds(30e-6, 20), hot=rounds(20e-6, 20), error=1e-7, how="graph"
            ),
            "released, eager": Outcome(seconds=rounds(300e-6, 20), hot=rounds(280e-6, 20)),
            "fused": Outcome("left out", "fused-lncc is not installed"),
        }
        if number == 3:
            contenders["ulae_rt"] = Outcome("wrong", "off by 3.1e-02", error=0.031)
        if number == 5:
            contenders["released, eager"] = Outcome("failed", "OutOfMemoryError: too large")
        cases.append(
            make_case(
                f"kernel {number}", contenders, suite="kernels", baseline="released, eager",
                bytes=98_304_000, goal="1.25 floors",
            )
        )  # fmt: skip
    for batch in (1, 8):
        contenders = {
            "released": Outcome(seconds=rounds(0.06 * batch, 100), gpu_peak_gb=6.0),
            "released, compiled": Outcome(seconds=rounds(0.03 * batch, 30)),
            "ulae_rt bf16": Outcome(seconds=rounds(0.004 * batch, 100), gpu_peak_gb=1.1),
        }
        cases.append(
            make_case(
                "forward", contenders, own=("ulae_rt bf16",), batch=batch, flops=3.1e11 * batch,
                bytes=10**9 * batch,
            )
        )  # fmt: skip
    machine = {
        "name": "nvidia-h200",
        "title": "NVIDIA H200",
        "gpu": "NVIDIA H200",
        "sm_mhz": "1980",
    }
    rates = {"fp32": 5e13, "bf16": 7.6e14, "fp16": 7.4e14}
    return record(machine, cases=cases, copy_bytes_per_second=4.3e12, matmul_flops_per_second=rates)
