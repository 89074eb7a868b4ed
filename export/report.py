"""One page about an engine folder: what is in it, and how far each is from the reference."""

from pathlib import Path

from ulae_rt.manifest import ANY_BATCH, VERIFIED, Manifest

REPORT = "REPORT.md"


def report_of(folder: Path) -> str:
    """Markdown, from the manifests in ``folder``."""
    manifests = [Manifest.read(path) for path in sorted(folder.glob("ulae-net-*.json"))]
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
    return "\n".join(rows) + "\n"


def _notes(manifests: list[Manifest]) -> list[str]:
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
    if any(manifest.status != VERIFIED for manifest in manifests):
        notes.append(
            "- *built, not run*: nothing on the exporting machine could run it. Export on a "
            "machine with that GPU to have it verified."
        )
    return notes
