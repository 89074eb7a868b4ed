"""The kernels that a training step spends its time in, the longest first: ``make profile-gpu``."""

import argparse
import sys

import torch
from torch.profiler import ProfilerActivity

from harness.case import FULL, Sizes
from harness.rounds import synchronise
from suites import training

ROWS = 25


def profile(sizes: Sizes) -> str:
    """One step of the package in bf16, one pair."""
    step = training.package(sizes, torch.bfloat16)
    for _ in range(training.WARM_UPS):
        step()
    on_gpu = training.device().type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    synchronise()
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        synchronise()
    totals: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[event.key] = (spent, event.count)
    whole = sum(spent for spent, _ in totals.values())
    order = sorted(totals.items(), key=lambda item: -item[1][0])[:ROWS]
    out = [f"one step: {whole / 1e3:.2f} ms in {sum(n for _, n in totals.values())} launches"]
    for name, (spent, count) in order:
        out.append(
            f"{spent / 1e3:>9.3f} ms {100 * spent / whole:>5.1f} % {count:>5} x  {name[:90]}"
        )
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", type=int, nargs=3, default=FULL, metavar=("D", "H", "W"),
        help="(160 192 160; a CPU takes 64 64 64 in a second)",
    )  # fmt: skip
    print(profile(tuple(parser.parse_args().shape)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
