"""One page about an engine folder: what is in it, and how far each is from the reference."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from ulae_rt.manifest import ANY_BATCH, VERIFIED, Manifest

REPORT = "REPORT.md"


_LEFT_OUT = "- Left out: "


def report_of(folder: Path, left_out: Mapping[str, str] = MappingProxyType({})) -> str:
    """Markdown, from the manifests in ``folder``.

    Args:
        folder: of engines.
        left_out: artefacts that were not made, by name, and why; those that the report in the
            folder names stay until they are made.
    """
    manifests = [Manifest.read(path) for path in sorted(folder.glob("ulae-net-*.json"))]
    reasons = {**_left_out_before(folder), **left_out}
    made = {manifest.artefact for manifest in manifests}
    rows = [
        "# Engines",
        "",
        "| file | for | batch | status | measured on | s a batch | displacement error, voxels: "
        "mean | p99 | largest | where it reaches | moved image, largest error | sign flips |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for manifest in manifests:
        batch = "any" if manifest.batch == ANY_BATCH else str(manifest.batch)
        first = f"| {manifest.artefact} | {manifest.target} | {batch} | {manifest.status} |"
        for each in manifest.errors:
            rows.append(
                f"{first} {each.pair}, {each.runtime} | {each.seconds:.3g} | {each.disp_mean:.1e} "
                f"| {each.disp_p99:.1e} | {each.disp_max:.1e} | {each.disp_largest:.1f} "
                f"| {each.moved_max:.1e} | {each.sign_flips} |"
            )
        if manifest.status != VERIFIED:
            rows.append(f"{first} | | | | | | | |")
    rows += ["", *_notes(manifests)]
    rows += [f"{_LEFT_OUT}{n}: {reason}" for n, reason in sorted(reasons.items()) if n not in made]
    return "\n".join(rows) + "\n"


def _left_out_before(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / REPORT).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    reasons = [line.removeprefix(_LEFT_OUT) for line in lines if line.startswith(_LEFT_OUT)]
    return {name: reason for name, _, reason in (line.partition(": ") for line in reasons)}


def _tolerances(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        values = ", ".join(f"{n} {v:g}" for n, v in asdict(manifest.tolerance).items())
        loose = manifest.tolerance.looser_than_standard(manifest.precision)
        yield f"- Tolerance of {manifest.artefact}: {values}." + (
            f" **Looser than the standard of {manifest.precision}: {', '.join(loose)}.**"
            if loose
            else ""
        )


def _notes(manifests: list[Manifest]) -> list[str]:
    if not manifests:
        return ["- No engine was made."]
    first = manifests[0]
    shape = " x ".join(map(str, first.metadata.shape))
    notes = [
        f"- Grid {shape}, {first.metadata.spacing_mm:g} mm; weights "
        f"`{first.weights_sha256[:12]}`, {first.metadata.variant}.",
        f"- Licence of the weights: {first.metadata.licence or 'unknown'}. Trained on: "
        f"{first.metadata.training_data or 'unknown'}.",
        "- Errors are the largest of several runs against the network in float64. A sign flip is a "
        "voxel whose Jacobian determinant has another sign.",
        "- Noise through canary heads finds nearest for linear sampling, exchanged axes and half "
        "voxels, which weights that displace little would hide.",
    ]
    notes += _tolerances(manifests)
    if any(manifest.status != VERIFIED for manifest in manifests):
        notes.append(
            "- *built, not run*: nothing on the exporting machine could run it. Export on a "
            "machine with that GPU to have it verified."
        )
    return notes
