"""Judge weights on labelled scans: every ordered pair, raw file to raw file.

    python bench/judge_weights.py SCANS [--weights FILE] [--out FILE.json]

SCANS is a folder of ID_t1.nii.gz with ID_labels.nii.gz beside each, in their scanner's space. Each
moving scan is registered to each other as `ulae-rt register` does it; its label map is carried to
the fixed scan's own grid (nearest voxel) by the affine alone and by the whole warp, and compared
with the fixed scan's.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import timing
from tqdm import tqdm

from ulae_rt.allocator import keep_freed_memory
from ulae_rt.imaging.grid import grid_of, resample
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.metrics import dice_per_label
from ulae_rt.registrar import Registrar

FIRST_CORTICAL_LABEL = 100
GROUPS = ("all", "cortex", "below 100")


def group_means(moved: np.ndarray, fixed: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Mean Dice over ``labels``, the cortical ones and the others; a label that was lost has 0."""
    scores = {k: np.nan_to_num(v) for k, v in dice_per_label(moved, fixed, labels).items()}
    cortex = [v for k, v in scores.items() if k >= FIRST_CORTICAL_LABEL]
    below = [v for k, v in scores.items() if k < FIRST_CORTICAL_LABEL]
    means = zip(GROUPS, (list(scores.values()), cortex, below), strict=True)
    return {name: float(np.mean(values)) for name, values in means} | {"labels": len(scores)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    registrar = Registrar(arguments.weights)
    names = sorted(p.name.removesuffix("_t1.nii.gz") for p in arguments.scans.glob("*_t1.nii.gz"))
    images = {n: read_volume(arguments.scans / f"{n}_t1.nii.gz") for n in names}
    labels = {n: read_volume(arguments.scans / f"{n}_labels.nii.gz", kind="labels") for n in names}
    rows = []
    for moving, fixed in tqdm(list(itertools.permutations(names, 2)), disable=None):
        result = registrar(images[moving], images[fixed], labels=labels[moving])
        assert result.moved_labels is not None
        target = labels[fixed].data.astype(np.int64)
        both = np.intersect1d(labels[moving].data, target)
        regions = [int(label) for label in both if label]
        affine = resample(labels[moving], grid_of(images[fixed]), result.affine, "nearest")
        moved = np.asarray(result.moved_labels.dataobj).astype(np.int64)
        rows.append(
            {
                "moving": moving,
                "fixed": fixed,
                "affine": group_means(affine.astype(np.int64), target, regions),
                "network": group_means(moved, target, regions),
                "folding_percent": result.stats.folding_percent,
                "seconds": result.stats.seconds,
            }
        )
    for method, group in itertools.product(("affine", "network"), GROUPS):
        values = [row[method][group] for row in rows]
        print(f"{method:<8} {group:<10} {np.mean(values):.4f}  (sd {np.std(values):.4f})")
    gain = [row["network"]["all"] - row["affine"]["all"] for row in rows]
    print(f"gain     all        {np.mean(gain):+.4f}  (least {min(gain):+.4f})")
    folding = [row["folding_percent"] for row in rows]
    print(f"folding  {np.mean(folding):.3f} % of the brain (most {max(folding):.3f} %)")
    seconds = {k: float(np.median([r["seconds"][k] for r in rows])) for k in rows[0]["seconds"]}
    print("seconds  " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()) + " (medians)")
    print(f"pairs    {len(rows)}, labels {rows[0]['network']['labels']}")
    if arguments.out:
        facts = {"machine": timing.machine(), "commit": timing.commit(), "pairs": rows}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
