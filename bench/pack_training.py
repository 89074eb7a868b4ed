"""Pack what ``make gpu-train`` needs and the GPU machine has not into one small archive.

``make gpu-training`` runs it: prepared scans and label maps, the packages that training needs, and
the kernels compiled beforehand, to be unpacked in ``build/``. A prepared scan is float32, and
fifteen of them are 107 MB. Here its values are stored as 256 steps from 0 to 1, each at most 0.002
off, which leaves a quarter.
"""

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

from harness import carried
from harness.record import ROOT

PARTS = ("train", "val")
MANIFEST = "prepared.json"
SITE = ROOT / "build" / "wheels" / "site"


def add_scans(archive: tarfile.TarFile, folder: Path, name: str) -> int:
    """Add the prepared scans of a folder as ``name``; how many there are."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for scan in manifest["scans"].values():
        for kind in ("image", "labels"):
            if scan[kind]:
                place = Path(scan[kind])
                scan[kind] = place.name.removesuffix(".gz")
                _add(archive, f"{name}/{scan[kind]}", _packed(folder / place, kind))
    _add(archive, f"{name}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
    return len(manifest["scans"])


def _packed(path: Path, kind: str) -> bytes:
    """A scan in bytes, with the scale that makes values from 0 to 1 of them; labels as they are."""
    import nibabel as nib

    image = nib.load(path)
    if kind == "labels":
        return nib.Nifti1Image(np.asarray(image.dataobj), image.affine).to_bytes()
    data = np.asarray(image.dataobj, np.float32)
    packed: bytes = nib.Nifti1Image(data, image.affine, dtype=np.uint8).to_bytes()
    return packed


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR",
        help="prepared scans in DIR/train and DIR/val: ulae-rt prepare SCANS -o DIR/train ...",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.tar.xz")
    arguments = parser.parse_args()
    for part in PARTS:
        if not (arguments.data / part / MANIFEST).is_file():
            print(
                f"error: {arguments.data / part}: no {MANIFEST} in it, expected prepared scans\n"
                f"hint: ulae-rt prepare SCANS -o {arguments.data / part} --template IMAGE",
                file=sys.stderr,
            )
            return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(arguments.out, "w:xz") as archive:
        counts = {
            part: add_scans(archive, arguments.data / part, f"training/{part}") for part in PARTS
        }
        for folder in (SITE, carried.CACHE):
            if folder.is_dir():
                archive.add(folder, str(folder.relative_to(ROOT / "build")))
    scans = ", ".join(f"{count} scans in {part}" for part, count in counts.items())
    print(f"{arguments.out}: {scans}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
