"""The page for people: what a batch did, what needs a look, and the worst pairs' pictures."""

import base64
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ulae_rt.batching.plots import Series, histogram
from ulae_rt.batching.ranking import ENOUGH, LIMIT, MEASURES, Ranked, known, rank
from ulae_rt.batching.results import ResultsFolder, Row
from ulae_rt.batching.summary import spread_of
from ulae_rt.errors import GeometryError, UlaeError
from ulae_rt.imaging.grid import gap_mm, grid_of
from ulae_rt.imaging.nifti import Outputs, output_error, read_volume
from ulae_rt.imaging.qc import qc_jpeg
from ulae_rt.imaging.warpfile import read_warp
from ulae_rt.reports import SIMILARITY

# Of a longer run the page lists those that need a look most: a browser sorts so many at once.
LISTED = 10_000
# So many of them stand in the table at first, all that there is without JavaScript.
SHOWN = 100
# So many of a kind are in sight; the others unfold.
GROUP = 8
# Characters of a message, of one in the table, and tracebacks: the results have them all.
MESSAGE, NOTE, TRACES = 400, 120, 5


def write_page(
    folder: ResultsFolder, rows: Sequence[Row], summary: Mapping[str, Any], worst: int
) -> Path:
    """Write the page about a batch: one HTML file that needs nothing else, least of all a network.

    Args:
        folder: of the batch; the pairs' warps are read from it.
        rows: of `read_results`.
        summary: as it is written to ``summary.json``.
        worst: pairs whose pictures are drawn, from their files as they now are.

    Returns:
        Where it is: `ResultsFolder.page`.

    Raises:
        OutputError: it cannot be written.
    """
    ranked = rank(rows)
    failed = [row for row in rows if row.status == "failed"]
    text = _template().render(
        summary=summary,
        results=folder.results.name,
        style=_STYLE,
        script=_SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
        similarity=SIMILARITY,
        finished=sorted(row.finished for row in rows if row.finished),
        failures=_grouped(failed[:LISTED]),
        traces=[row for row in failed if row.traceback][:TRACES],
        flagged=[each for each in ranked if each.flagged],
        warned=[row for row in rows if row.warnings],
        measures=MEASURES,
        limit=LIMIT,
        enough=ENOUGH,
        spreads=_spreads(ranked),
        plots=_plots(ranked),
        stages=_stages(ranked),
        pictures=[(each, _picture(folder.path, each.row)) for each in ranked[:worst]],
        table=_in_order(ranked, failed)[:LISTED],
        shown=SHOWN,
        inverse=any(row.inverse_consistency_mm is not None for row in rows),
        group=GROUP,
        note=NOTE,
    )
    with Outputs([folder.page], overwrite=True, suffixes={folder.page: (".html",)}) as outputs:
        try:
            # Names of files need not be Unicode, and what stands for their bytes is no UTF-8.
            outputs.temporary(folder.page).write_bytes(text.encode("utf-8", "replace"))
            outputs.commit()
        except OSError as error:
            raise output_error(folder.page, error) from None
    return folder.page


_FILES = files("ulae_rt.batching")
_STYLE = Markup((_FILES / "page.css").read_text(encoding="utf-8"))
_SCRIPT = Markup((_FILES / "page.js").read_text(encoding="utf-8"))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        digits=_digits, signed=_signed, share=_share, duration=_duration, clipped=_clipped,
        moment=_moment,
    )  # fmt: skip
    return environment.from_string((_FILES / "page.html").read_text(encoding="utf-8"))


def _digits(value: float | None) -> str:
    """Three decimals: what of a similarity or a percentage still means something."""
    if known(value) is None or value is None:
        return "–"
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "–"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _moment(text: str) -> str:
    """``2026-11-23 01:06`` of an ISO 8601 time."""
    return text[:16].replace("T", " ")


def _clipped(text: str, length: int = MESSAGE) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _grouped(failed: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """By what to do about them, the commonest first."""
    groups: dict[str, list[Row]] = {}
    for row in failed:
        groups.setdefault(row.hint, []).append(row)
    return sorted(groups.items(), key=lambda each: -len(each[1]))


def _in_order(ranked: Sequence[Ranked], failed: Sequence[Row]) -> list[Ranked]:
    """Those that need a look, those that failed, and the others."""
    flagged = [each for each in ranked if each.flagged]
    return [*flagged, *[Ranked(row, None) for row in failed], *ranked[len(flagged) :]]


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in map(known, values) if value is not None]


def _spreads(ranked: Sequence[Ranked]) -> list[tuple[str, dict[str, float]]]:
    """Spread of every figure over the pairs that have it."""
    columns = {
        "Similarity before (affine only)": [each.row.similarity_before for each in ranked],
        "Similarity after": [each.row.similarity_after for each in ranked],
        "Gain in similarity": [each.gain for each in ranked],
        "Folding in the brain, %": [each.row.folding_percent for each in ranked],
        "Folding in the whole image, %": [each.row.folding_image_percent for each in ranked],
        "Inverse consistency, mm": [each.row.inverse_consistency_mm for each in ranked],
    }
    return [
        (name, spread_of(present))
        for name, values in columns.items()
        if (present := _present(values))
    ]


@dataclass(frozen=True)
class _Plot:
    """A histogram with its title and its key: names of its series, and what else to say."""

    title: str
    svg: Markup
    key: dict[str, Series]
    note: str = ""


def _plots(ranked: Sequence[Ranked]) -> list[_Plot]:
    plots = []
    similarity = _key(
        ("before", [each.row.similarity_before for each in ranked], "--before"),
        ("after", [each.row.similarity_after for each in ranked], "--after"),
    )
    if similarity:
        step = 0.05
        values = [value for each in similarity.values() for value in each.values]
        low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
        plots.append(
            _Plot(
                "Similarity before and after",
                histogram(
                    list(similarity.values()),
                    span=(low, max(high, low + step)),
                    axis="similarity (correlation, 1 is identical)",
                    said="Histogram of the similarity before and after",
                ),
                similarity,
            )
        )
    folding = _key(("folding, %", [each.row.folding_percent for each in ranked], "--fold"))
    for series in folding.values():
        # One pair gone wrong must not press all others into the first bar.
        top = max(3 * spread_of(series.values)["p95"], 0.01)
        beyond = sum(value > top for value in series.values)
        plots.append(
            _Plot(
                "Folding in the brain",
                histogram(
                    [series],
                    span=(0.0, top if beyond else 1.05 * max(*series.values, 0.01)),
                    axis="folded voxels of the brain, %",
                    said="Histogram of the folding in the brain",
                ),
                folding,
                f"Values above {_digits(top)} % are counted in the last bar: {beyond:,} of "
                f"{len(series.values):,}."
                if beyond
                else "",
            )
        )
    return plots


def _key(*columns: tuple[str, Sequence[float | None], str]) -> dict[str, Series]:
    """Series by name, of (name, values, variable of CSS); without those that have no values."""
    return {
        name: Series(present, spread_of(present)["p50"], colour)
        for name, values, colour in columns
        if (present := _present(values))
    }


def _stages(ranked: Sequence[Ranked]) -> list[tuple[str, float]]:
    """Mean seconds a pair by stage, the longest first."""
    sums: dict[str, float] = {}
    for each in ranked:
        for stage, taken in each.row.seconds.items():
            sums[stage] = sums.get(stage, 0.0) + (known(taken) or 0.0)
    means = [(stage, total / len(ranked)) for stage, total in sums.items()]
    return sorted(means, key=lambda each: -each[1])


@dataclass(frozen=True)
class _Picture:
    """A JPEG file in base64, or why there is none."""

    jpeg: str = ""
    problem: str = ""


def _picture(folder: Path, row: Row) -> _Picture:
    if "warp" not in row.outputs or row.affine is None:
        return _Picture(problem="its warp was not kept: add warp to --outputs")
    try:
        with _quiet():
            jpeg = _drawn(folder, row, np.asarray(row.affine, np.float64))
    except Exception as error:  # whatever has become of one pair's files, the page is written
        if not isinstance(error, UlaeError):
            return _Picture(problem=f"{type(error).__name__}: {error}")
        hint = f" ({error.hint})" if error.hint else ""
        return _Picture(problem=f"{error}{hint}")
    return _Picture(base64.b64encode(jpeg).decode())


def _drawn(folder: Path, row: Row, affine: np.ndarray[Any, np.dtype[np.float64]]) -> bytes:
    # They load torch, for which a page without pictures does not wait.
    from ulae_rt.imaging.image import as_array, file_order, image_of, resample
    from ulae_rt.imaging.transform import (
        add_affine,
        as_displacement,
        in_mm,
        jacobian_determinant,
        warp_image,
    )

    fixed, moving = read_volume(row.pair.fixed), read_volume(row.pair.moving)
    warp = read_warp(folder / row.outputs["warp"], fixed=fixed)
    grid = grid_of(fixed)
    if fixed.shape != warp.grid.shape or gap_mm(grid, grid_of(warp.grid)):
        raise GeometryError(
            f"{fixed.name} does not lie on the grid of the warp any more",
            "register the pair again, into another folder",
        )
    grid = file_order(grid)
    disp, image = in_mm(warp.disp), image_of(moving)
    without_affine = add_affine(disp, grid, np.asarray(np.linalg.inv(affine)))
    return qc_jpeg(
        fixed=fixed.data,
        before=as_array(resample(image, grid, affine)),
        after=as_array(warp_image(image, disp, grid)),
        disp=as_displacement(without_affine),
        jacobian=as_array(jacobian_determinant(disp, grid.affine)),
        affine=fixed.affine,
        caption=row.id,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about the scans: their pair's row has them since they were registered."""
    package = logging.getLogger("ulae_rt")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)
