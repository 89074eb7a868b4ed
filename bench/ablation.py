"""The ablation of the paper's Table 2 at small scale, one command.

    python bench/ablation.py [--steps N] [--out DIR]

needs ``ULAE_RT_DATA``, and of the package what ``train`` and ``evaluate`` bring. It brings the
scans to the template, trains four networks from nothing, each with one thing more than the one
before, by ``configs/oasis-2mm.toml`` and for the same number of steps, registers the 20 ordered
pairs of OASIS val by each, and writes ``results/ablation-<date>-<commit>.csv``, ``.md`` and
``.json``. What was stopped goes on. On two quiet cores it takes an hour and a
quarter.
"""

import argparse
import csv
import sys
from pathlib import Path
from statistics import fmean

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.record import ROOT
from harness.registering import Way, data_dir, measure, register, ulae_rt

KIND = "ablation"
TEMPLATE = "samples/mni152_2009a_brain.nii.gz"
# What each network adds to the one before, as entries of its configuration. The single window is
# the first of the several, whose weight in their sum is 1.
STAGES = {
    "baseline": ("baseline: one pass of a U-Net, one window", {}),
    "accumulate": ("+ accumulation", {"model.accumulate": "true"}),
    "uncoupled": ("+ uncoupled encoder", {"model.uncoupled": "true"}),
    "windows": ("+ windows 7 and 5", {"loss.windows": "[7, 5]"}),
}
BASELINE = {"model.accumulate": "false", "model.uncoupled": "false", "loss.windows": "[7]"}
STEPS = 600


def main() -> int:
    """Prepare, train, register, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / KIND, metavar="DIR")
    arguments = parser.parse_args()
    scans = data_dir(parser) / "oasis"
    out = arguments.out.resolve()
    prepared = out / "prepared"
    for part in ("train", "val"):
        if not (prepared / part / "prepared.json").exists():
            ulae_rt("prepare", scans / part, "-o", prepared / part, "--template", TEMPLATE)
    entries = dict(BASELINE)
    ways, notes = {}, {}
    for name, (title, added) in STAGES.items():
        entries |= added
        run = out / f"training-{name}"
        train(run, prepared, {**entries, "optimiser.steps": str(arguments.steps)})
        with (run / "log.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        notes[name] = {
            "settings": dict(entries),
            "steps": int(rows[-1]["step"]),
            "seconds_a_step": fmean(float(row["seconds"]) for row in rows),
        }
        ways[name] = Way(title, ("--weights", str(run / "last.safetensors")))
    register(ways, scans / "val", out)
    # The folder of the weights is this machine's own, and no part of what was found.
    measure(KIND, {name: Way(way.title) for name, way in ways.items()}, out, notes)
    return 0


def train(run: Path, prepared: Path, entries: dict[str, str]) -> None:
    """Train to the end, from where an earlier call stopped."""
    entries = entries | {
        "data.train": str(prepared / "train"),
        "data.val": str(prepared / "val"),
        "output.folder": str(run),
        "output.validate_every": entries["optimiser.steps"],
    }
    changes = [flag for key, value in entries.items() for flag in ("--set", f"{key}={value}")]
    begun = ["--resume"] if (run / "state.pt").exists() else []
    ulae_rt("train", "configs/oasis-2mm.toml", *changes, *begun)


if __name__ == "__main__":
    sys.exit(main())
