"""The table of accuracy: every method and baseline on the pairs of OASIS val, one command.

    python bench/accuracy.py [--methods NAME[,NAME...]] [--out DIR]

needs ``ULAE_RT_DATA``, and of the package what ``evaluate`` and ``baselines`` bring. It registers
the 20 ordered pairs by each method that is not done yet (what was stopped goes on), measures all of
them together, and writes ``results/accuracy-oasis-val-<date>-<commit>.csv`` and ``.md``. On two
cores SyN and greedy take 35 and 40 minutes, the network alone 3.
"""

import argparse
import datetime
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.machine import commit
from harness.record import RESULTS, ROOT
from ulae_rt import env

LABELS = ROOT / "ulae_rt" / "model" / "weights" / "ulae-oasis-labels.safetensors"
# By name: what `batch` is given. The affine alone and doing nothing are evaluate's own.
METHODS = {
    "syn": ["--method", "syn"],
    "greedy": ["--method", "greedy"],
    "network": [],
    "network+10": ["--refine", "10"],
    "network+50": ["--refine", "50"],
    "network+200": ["--refine", "200"],
    "labels": ["--weights", str(LABELS)],
    "labels+50": ["--weights", str(LABELS), "--refine", "50"],
}


def main() -> int:
    """Run what is missing, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="which ones (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "accuracy", metavar="DIR")
    arguments = parser.parse_args()
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method {unknown[0]}, expected some of {', '.join(METHODS)}")
    data = env.data_dir()
    if data is None:
        parser.error("ULAE_RT_DATA is not set: give it the folder that has oasis/val")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    pairs = out / "pairs.csv"
    if not pairs.exists():
        ulae_rt("pairs", Path(data) / "oasis" / "val", "-o", pairs, "--protocol", "oasis")
    for name in names:
        folder = out / name
        begun = ["--resume"] if (folder / "run.json").exists() else []
        ulae_rt("batch", pairs, "-o", folder, "--outputs", "warp", *METHODS[name], *begun)
    report = out / "report"
    folders = [f"{name}={out / name}" for name in names]
    ulae_rt("evaluate", *folders, "-o", report, "--protocol", "oasis", "--overwrite")
    came_from, dirty = commit()
    day = datetime.datetime.now(datetime.UTC)
    stem = f"accuracy-oasis-val-{day:%Y-%m-%d}-{came_from}{'-dirty' * dirty}"
    for file, suffix in (("cases.csv", "csv"), ("table.md", "md")):
        shutil.copyfile(report / file, RESULTS / f"{stem}.{suffix}")
        print(f"written: {RESULTS / f'{stem}.{suffix}'}")
    return 0


def ulae_rt(command: str, *arguments: object) -> None:
    """Run one of the package's commands, and stop with it if it fails."""
    line = [sys.executable, "-P", "-m", f"ulae_rt.{command}", *map(str, arguments)]
    print("$", *line[3:], flush=True)
    status = subprocess.run(line, check=False).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(main())
