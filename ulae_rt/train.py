"""Train ULAE-net on prepared scans, as a TOML file says.

On several GPUs: torchrun --nproc-per-node N -m ulae_rt.train CONFIG
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ulae_rt.cli import EXIT_INTERRUPTED, Report, run_command
from ulae_rt.optional import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``train``."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="TOML file; see configs/")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the output folder's checkpoint, exactly"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="in place of what the file says; may be given more than once",
    )  # fmt: skip


def run(arguments: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Train; returns the last losses and where the weights are."""
    for module in ("torch", "safetensors", "tensorboard"):
        require(module, "train")
    from ulae_rt.allocator import keep_freed_memory
    from ulae_rt.training.config import read_config
    from ulae_rt.training.loop import StoppedElsewhere, Trainer

    keep_freed_memory()
    trainer = Trainer(read_config(arguments.config, arguments.changes), resume=arguments.resume)
    try:
        result = trainer.run(report)
    except StoppedElsewhere:
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if trainer.processes.first:
            raise
        raise SystemExit(EXIT_INTERRUPTED) from None
    if not trainer.processes.first:
        raise SystemExit(0)  # one process speaks for all, under --json too
    report(f"weights: {result['weights']}")
    return result


if __name__ == "__main__":
    sys.exit(run_command("train"))
