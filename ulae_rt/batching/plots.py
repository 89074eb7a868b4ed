"""Small plots for a page: SVG that takes the page's font and colours, in light and in dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

# Points; the page scales it to its column.
WIDTH, HEIGHT = 400, 190
MOST_BINS = 40
# Up to so many values each has a tick of its own under the bars.
TICKS = 300

# matplotlib knows no variables of CSS: it draws with these, and they are replaced.
_INK, _QUIET, _LINE = "#010101", "#020202", "#030303"
_COLOURS = {_INK: "var(--ink)", _QUIET: "var(--quiet)", _LINE: "var(--line)"}


@dataclass(frozen=True)
class Series:
    """Values of a histogram, their median, and the variable of CSS that colours them."""

    values: Sequence[float]
    median: float
    colour: str


def histogram(
    series: Sequence[Series], *, span: tuple[float, float], axis: str, said: str
) -> Markup:
    """Bars of how many pairs have which value, each series' median as a dashed line.

    Args:
        series: drawn over each other; at least one has values.
        span: the least and the greatest value of the axis; values outside count in its end bars.
        axis: what the values are, with their unit.
        said: what the plot shows, for who cannot see it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    most = max(len(each.values) for each in series)
    edges = np.linspace(*span, int(np.clip(2 * np.sqrt(most), 12, MOST_BINS)) + 1)
    colours = dict(_COLOURS)
    # Text as text, so that it is the page's; the salt makes the same plot the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": said}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, each in enumerate(series):
            colour = f"#0400{number:02}"
            colours[colour] = f"var({each.colour})"
            values = np.clip(each.values, *span).tolist()
            axes.hist(
                values, edges.tolist(), color=colour, alpha=0.55, edgecolor=colour, linewidth=0.8
            )
            axes.axvline(each.median, color=colour, linestyle=(0, (4, 3)), linewidth=1.4)
            if len(values) <= TICKS:
                axes.vlines(
                    values, -0.045, 0, color=colour, linewidth=0.8, clip_on=False,
                    transform=axes.get_xaxis_transform(),
                )  # fmt: skip
        axes.set_xlim(*span)
        axes.set_xlabel(axis, color=_INK, fontsize=9)
        axes.set_ylabel("pairs", color=_INK, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(colors=_QUIET, labelsize=8.5, length=3)
        axes.tick_params(axis="x", pad=7)
        axes.grid(axis="y", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_QUIET)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _inline(file.getvalue(), colours, said)


def _inline(svg: str, colours: dict[str, str], said: str) -> Markup:
    """The drawing as an element of the page, with no name that another plot also has."""
    start = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">'
    svg = re.sub(r"<svg\b[^>]*>", lambda _: start, svg[svg.index("<svg") :], count=1)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[\w.]+">', "<g>", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub("#[0-9a-f]{6}", lambda found: colours.get(found[0], found[0]), svg)
    return Markup(svg)  # made here, of numbers and of the two texts above
