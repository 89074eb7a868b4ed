"""Measure launch configurations on a GPU, and propose lines for the table of them.

    make tune-gpu ARGS='warp_forward lncc_score'     (all kernels by default)

For each kernel of ``kernels/_configs.py`` and each grid, the configurations around the current one
are tried: tiles with axes up to 2^STEPS times longer or shorter, and half to twice the warps. One
whose result differs from the current one's is dropped. The operator that launches the kernel is
captured in a CUDA graph and replayed with a cold and with a warm L2 cache, the candidates in turn.
Printed are the lines to paste before the current ones, which a person judges and commits.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness import machine
from harness.checkout import commit
from harness.files import write_whole
from harness.record import results_folder
from ulae_rt import kernels
from ulae_rt.kernels import _configs
from ulae_rt.kernels._configs import TABLE, LaunchConfig, Line, launch_config

GRIDS = ((160, 192, 160), (80, 96, 80))
WORTH = 1.03  # a line for less than this is noise that somebody has to maintain
MOST_ELEMENTS = 128  # of a lane
FLUSH = 2**28  # bytes, more than any L2 cache has
# Sums whose order the tile changes: of the largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Outputs = list[Tensor]


class Job(NamedTuple):
    """A call that launches the kernel, and the type of what it reads."""

    call: Callable[[], Any]
    dtype: torch.dtype = torch.float32


def jobs(grid: tuple[int, ...], device: str) -> dict[str, Job]:
    """The operators themselves, without autograd: by the kernel that each is for."""
    torch.manual_seed(0)
    ops = torch.ops.ulae_rt

    def smooth(channels: int, factor: int = 1) -> Tensor:
        # Neighbours move alike, as in a brain: what gathers and atomics cost depends on it.
        knots = torch.rand(1, channels, 5, 6, 5, device=device)
        return interpolate(knots, [size // factor for size in grid], mode="trilinear")

    def features(channels: int, factor: int = 1) -> Tensor:
        sizes = [size // factor for size in grid]
        noise = torch.rand(1, channels, *sizes, device=device, dtype=torch.bfloat16)
        return noise.contiguous(memory_format=torch.channels_last_3d)

    image, fixed = smooth(1), smooth(1)
    disp, coarse = 8 * smooth(3) - 4, 4 * smooth(3, 2) - 2
    weights = torch.ones(3, device=device)
    # A head leans by a few degrees.
    turned = torch.tensor([[0.99, 0.1, 0.0, 0.0], [-0.1, 0.99, 0.1, 0.0], [0.0, -0.1, 0.99, 0.0]])
    turned = turned.to(device)[None]
    halved = turned / 2  # onto a field at half the resolution
    wide, narrow, pair = features(16), features(16, 2), features(2)
    concatenated = features(18)
    mean_term = torch.rand(1, 32, device=device)
    taps = torch.rand(4, 32, 16, 3, 3, 3, device=device, dtype=torch.bfloat16) - 0.5
    gray, block = features(1), (narrow, features(32, 4), mean_term, taps, [1, 3, 6, 9])
    image_block = (gray, narrow, mean_term[:, :16], taps[:, :16, :1], [1, 4, 8, 12])
    rstd = torch.ones(1, 16, device=device)
    lncc = Job(lambda: ops.lncc(image, fixed, [11, 9, 7], 1e-5))
    lncc_gradient = Job(
        lambda: ops.lncc_gradient(image, fixed, weights, [11, 9, 7], 1e-5, True, False)
    )
    norm = Job(
        lambda: (*ops.norm_activate(wide), ops.norm_activate_backward(wide, wide, rstd)),
        torch.bfloat16,
    )
    # Those of a fixed image's brain, and the starts of a search.
    points = torch.stack([torch.randint(size, (50_000,), device=device) for size in grid]).float()
    values, starts = torch.rand(50_000, device=device), turned.expand(125, -1, -1)

    def normal_equations(matrix: Tensor, degree: int, derivatives: bool) -> Job:
        options = (degree, derivatives, [False] * 6)
        return Job(lambda: ops.affine_normal_equations(image, points, values, matrix, *options))

    return {
        "affine_normal_equations": normal_equations(turned, 1, True),
        "affine_normal_equations_sum": normal_equations(turned, 1, True),
        "affine_normal_equations_values": normal_equations(starts, 4, False),
        "compose_backward": Job(lambda: ops.compose_backward(disp, disp, disp, 1, True, True)),
        "compose_forward": Job(lambda: ops.compose(disp, disp, 1)),
        "diffusion": Job(lambda: kernels.diffusion_with_gradient(disp)),
        "diffusion_sum": Job(lambda: kernels.diffusion(disp)),
        "lncc_gradient": lncc_gradient,
        "lncc_planes": lncc,
        "lncc_score": lncc,
        "lncc_spread_planes": lncc_gradient,
        "moving_block": Job(lambda: ops.moving_block(*block), torch.bfloat16),
        "moving_block_narrow": Job(lambda: ops.moving_block(*image_block), torch.bfloat16),
        "norm_activate": norm,
        "norm_activate_merge": norm,
        "resize_backward": Job(lambda: ops.resize_displacement_backward(disp, 2)),
        "resize_forward": Job(lambda: ops.resize_displacement(coarse, 2)),
        "sample_world": Job(lambda: ops.sample_world(image, turned, disp, None, grid, "linear", 1)),
        "upsample_concat_backward": Job(
            lambda: ops.upsample_concat_backward(concatenated, 16), torch.bfloat16
        ),
        "upsample_concat_forward": Job(
            lambda: ops.upsample_concat(narrow, pair, 18), torch.bfloat16
        ),
        "warp_backward": Job(
            lambda: ops.warp_backward(image, image, disp, "zeros", "linear", 1, True, True)
        ),
        "warp_compose_backward": Job(
            lambda: ops.warp_compose_backward(image, disp, image, disp, disp, 1, True, True, True)
        ),
        "warp_compose_forward": Job(lambda: ops.warp_compose(image, disp, disp, 1)),
        "warp_forward": Job(lambda: ops.warp(image, disp, "zeros", "linear", 1)),
        "world_displacement": Job(
            lambda: ops.world_displacement(coarse, halved, turned[:, :, :3], turned, grid)
        ),
        "world_jacobian": Job(lambda: ops.world_jacobian(disp, turned[:, :, :3])),
    }


def candidates(current: LaunchConfig, steps: int) -> list[LaunchConfig]:
    """The current configuration, then those around it that give every lane something to do."""
    found = [current]
    shifts = itertools.product(range(-steps, steps + 1), repeat=len(current.tile))
    for shift, warps in itertools.product(shifts, (1, 2, 4, 8, 16)):
        sizes = [size * 2.0**by for size, by in zip(current.tile, shift, strict=True)]
        config = LaunchConfig(tuple(int(size) for size in sizes), warps)
        elements = math.prod(config.tile) / (32 * warps)
        if (
            min(sizes) >= 1
            and abs(sum(shift)) <= steps
            and current.warps <= 2 * warps <= 4 * current.warps
            and 1 <= elements <= MOST_ELEMENTS
            and config not in found
        ):
            found.append(config)
    return found


def line(config: LaunchConfig, grid: tuple[int, ...], itemsize: int, arch: int) -> str:
    """As the table has it; for the smaller grid, it ends where that grid's rows do."""
    width = "" if grid == GRIDS[0] else f"width_at_most={grid[2]}, "
    return f"Line({config!r}, {width}itemsize={itemsize}, archs=({arch},)),"


@contextlib.contextmanager
def using(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """``config`` for every launch of ``kernel``."""
    before = TABLE[kernel]
    _configs.TABLE[kernel] = (Line(config),)
    try:
        yield
    finally:
        _configs.TABLE[kernel] = before


def outputs(call: Callable[[], Any]) -> Outputs:
    """What the operator returns, as a list of the tensors that are not empty."""
    found = call()
    return [x for x in (found if isinstance(found, tuple | list) else [found]) if x.numel()]


def wrong(actual: Outputs, expected: Outputs) -> str:
    """By how much a result is off, where it is more than the order of summation explains."""
    for a, b in zip(actual, expected, strict=True):
        scale = b.abs().amax().clamp(min=1e-30).double()
        error = ((a.double() - b.double()).abs().amax() / scale).item()
        if not error <= TOLERANCE[b.dtype]:  # NaN too
            return f"off by {error:.1e} of the largest value"
    return ""


def captured(call: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
    """One call as a graph, which the host replays in less time than the GPU needs for it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


def measure(graphs: list[torch.cuda.CUDAGraph], rounds: int) -> list[dict[str, list[float]]]:
    """Microseconds of each graph, the caches cold and then warm, ``rounds`` times in turn."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    times: list[dict[str, list[float]]] = [{"cold": [], "warm": []} for _ in graphs]
    for _ in range(rounds):
        for graph, found in zip(graphs, times, strict=True):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            flush.zero_()  # takes longer than the host needs to queue what follows
            events[0].record()
            graph.replay()
            events[1].record()
            graph.replay()
            events[2].record()
            torch.cuda.synchronize()
            found["cold"].append(1e3 * events[0].elapsed_time(events[1]))
            found["warm"].append(1e3 * events[1].elapsed_time(events[2]))
    return times


def tune(kernel: str, job: Job, tried: list[LaunchConfig], rounds: int) -> list[dict[str, Any]]:
    """A row for each configuration: microseconds, or why it was dropped."""
    rows: list[dict[str, Any]] = []
    graphs = []
    pool = torch.cuda.graph_pool_handle()  # one for all: nobody reads what a replay leaves
    expected: Outputs = []
    for config in tried:
        row: dict[str, Any] = {"tile": config.tile, "warps": config.warps}
        try:
            with using(kernel, config):
                actual = outputs(job.call)
                expected = expected or actual
                row["dropped"] = wrong(actual, expected)
                if not row["dropped"]:
                    graphs.append(captured(job.call, pool))
        except Exception as error:  # too large for the machine, in one of many ways
            row["dropped"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append(row)
    kept = [row for row in rows if not row["dropped"]]
    for row, times in zip(kept, measure(graphs, rounds), strict=True):
        row |= times | {f"median_{name}": statistics.median(us) for name, us in times.items()}
    return rows


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the fastest five beside the current one; the fastest with cold caches is returned."""
    kept = [row for row in rows if not row["dropped"]]
    ranked = sorted(kept, key=lambda row: row["median_cold"])
    for row in [rows[0], *[row for row in ranked if row is not rows[0]][:5]]:
        print(f"  {row['tile']!s:<16} {row['warps']:>2} warps"
              f"{row['median_cold']:>9.1f} us cold{row['median_warm']:>9.1f} us warm")  # fmt: skip
    for row in rows:
        if row["dropped"]:
            print(f"  {row['tile']!s:<16} {row['warps']:>2} warps  dropped: {row['dropped']}")
    return ranked[0]


class TuneRecord:
    """The file of a run: every candidate's samples, the proposals, and the machine.

    Args:
        source: `harness.checkout.commit`'s.
    """

    def __init__(self, source: tuple[str, bool]) -> None:
        commit, dirty = source
        facts = machine.facts()
        today = datetime.date.today().isoformat()
        name = f"tune-{facts['name']}-{today}-{commit}{'-dirty' * dirty}.json"
        self.path = results_folder() / name
        self.kernels: dict[str, list[dict[str, Any]]] = {}
        self.proposals: list[str] = []
        self._about = {"machine": facts, "versions": machine.versions()}

    def write(self) -> None:
        """Write what is known, after every kernel: a run that is killed loses the one in hand."""
        content = {**self._about, "kernels": self.kernels, "proposals": self.proposals}
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(TABLE))
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates, run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.kernels) - set(TABLE):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}")
    if not arguments.dry_run and not torch.cuda.is_available():
        print("error: needs a CUDA device\nhint: --dry-run lists what would be tried",
              file=sys.stderr)  # fmt: skip
        return 1
    arch = 90
    if not arguments.dry_run:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    try:
        source = commit()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record = None if arguments.dry_run else TuneRecord(source)
    for grid in GRIDS:
        title = "x".join(map(str, grid))
        found = jobs(grid, "meta" if arguments.dry_run else "cuda")
        for kernel in arguments.kernels or TABLE:
            job = found[kernel]
            current = launch_config(kernel, grid[2], job.dtype, arch)
            tried = candidates(current, arguments.steps)
            print(f"{kernel}, {title}, sm_{arch}: {len(tried)} configurations", flush=True)
            if record is None:
                print(*(f"  {line(config, grid, job.dtype.itemsize, arch)}" for config in tried),
                      sep="\n")  # fmt: skip
                continue
            rows = record.kernels[f"{kernel} {title}"] = tune(kernel, job, tried, arguments.rounds)
            best = report(rows)
            gain = rows[0]["median_cold"] / best["median_cold"]
            if gain >= WORTH:
                config = LaunchConfig(best["tile"], best["warps"])
                text = line(config, grid, job.dtype.itemsize, arch)
                record.proposals.append(f'"{kernel}": {text}  # {gain:.2f} times as fast')
            record.write()
    if record is not None:
        print("\nto paste before the lines that are there:", *(record.proposals or ["nothing"]),
              sep="\n")  # fmt: skip
        print(record.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
