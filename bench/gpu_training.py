"""Train for the minutes that one has a GPU, and leave what goes on exactly on the next one.

``make gpu-train MINUTES=9 OUT=DIR`` begins, with ``CHECKPOINT=DIR/run`` of an earlier command it
goes on. Every two seconds the losses, the speed and the memory become a line of
``OUT/evidence.jsonl``, on the disk at once; the checkpoint, the weights and the log lie in
``OUT/run``.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from harness import carried, machine
from harness.checkout import commit
from harness.evidence import Evidence
from harness.record import ROOT
from ulae_rt.errors import ConfigError, UlaeError

CONFIG = ROOT / "configs" / "oasis-1mm-labels.toml"
STAGE = "training at 1 mm"
# Between two rows: often enough for a curve, and no load on the disk.
SECONDS = 2.0


def train(arguments: argparse.Namespace, evidence: Evidence, started: float) -> None:
    """Train until the minutes are over, counted from ``started``.

    Raises:
        UlaeError: whatever `ulae_rt.training` says is wrong.
    """
    from ulae_rt.training.config import read_config
    from ulae_rt.training.loop import Trainer

    class Recorded(Trainer):
        """Tells the evidence what it logs."""

        def _row(self, *parts: Any) -> dict[str, Any]:
            row = super()._row(*parts)
            now = time.monotonic()
            if now - self.told >= SECONDS or "val_dice" in row:
                self.told = now
                evidence.add("step", **row, gpu_peak_gb=_peak_gb())
            return row

        told = 0.0

    run = arguments.out / "run"
    resume = arguments.checkpoint is not None
    left = arguments.minutes - (time.monotonic() - started) / 60
    changes = [
        f"data.train={arguments.data / 'train'}", f"data.val={arguments.data / 'val'}",
        f"output.folder={run}", *arguments.changes, f"run.minutes={max(left, 1e-5)}",
    ]  # fmt: skip
    try:
        trainer = Recorded(read_config(arguments.config, changes), resume=resume)
    except UlaeError:
        if resume:  # what was copied, or the next try would find it in its place
            shutil.rmtree(run)
        raise
    first = trainer.step
    evidence.add(
        "begun", step=first, scans=len(trainer.scans), device=str(trainer.processes.device),
        seconds=time.monotonic() - started, config=trainer.config.model_dump(mode="json"),
    )  # fmt: skip

    def report(line: str) -> None:
        print(line, flush=True)

    before, since = carried.folders(carried.CACHE), time.monotonic()
    result = trainer.run(report)
    seconds = time.monotonic() - since
    evidence.add(
        "ended", **result, run_seconds=seconds, steps_per_second=(trainer.step - first) / seconds,
        gpu_peak_gb=_peak_gb(), compiled_anew=len(carried.folders(carried.CACHE) - before),
    )  # fmt: skip


def _peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def begin_with(checkpoint: Path, run: Path) -> None:
    """Put an earlier command's run where this one goes on with it.

    Raises:
        ConfigError: there is none, or something is in its place.
    """
    if not (checkpoint / "state.pt").is_file():
        raise ConfigError(
            f"CHECKPOINT is {checkpoint}, expected the folder run/ of an earlier command, with "
            "state.pt in it",
            "give that folder, or leave CHECKPOINT out to begin anew",
        )
    if run.exists():
        raise ConfigError(f"{run} exists, expected a new folder", "give another OUT")
    shutil.copytree(checkpoint, run)


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, required=True, help="from start to end")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="with train/ and val/, prepared"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="run/ of an earlier command")
    parser.add_argument("--config", type=Path, default=CONFIG, help="(%(default)s)")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="in place of what the configuration says; may be given more than once",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        source, changed = commit()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.minutes > 0:
        print(f"error: --minutes is {arguments.minutes:g}, expected more than 0", file=sys.stderr)
        return 1
    try:
        evidence = Evidence(arguments.out, STAGE)
    except OSError as error:
        print(f"error: --out {arguments.out}: {error.strerror}; give a new folder", file=sys.stderr)
        return 1
    evidence.add(
        "machine", **machine.facts(), commit=source, dirty=changed,
        kernels_carried=carried.use(carried.CACHE),
    )  # fmt: skip
    try:
        if arguments.checkpoint is not None:
            begin_with(arguments.checkpoint, arguments.out / "run")
        train(arguments, evidence, started)
    except Exception as error:
        evidence.add("failed", error=f"{type(error).__name__}: {error}")
        if not isinstance(error, UlaeError):
            raise
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
