"""Small charts for the page: SVG written by hand, which takes the page's font and colours.

By hand because the machine with the GPU, which makes the page, has torch, numpy and Jinja2 and no
matplotlib. Across, everything is in percent and there is no viewBox: a chart fills its column at
any width while its text keeps the page's size, so that it can be read on a telephone.
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

from report import words
from report.figures import ENOUGH, Fit, exponent, percentile, quartiles
from report.tables import Kind

# Characters of a line of text: what a telephone shows of the widest font of the page.
WRAP = 40
# Percent of a chart's width in which bars and dots lie; what they say stands to the right.
LANE = 64.0
# Percent of a plot's width where its axes begin and end.
LEFT, RIGHT = 15.0, 98.0
LINE, BAR, GAP, AXIS = 17, 12, 12, 24
HEIGHT, TOP, BOTTOM = 270, 26, 44
# Fewer rounds than this are drawn one by one.
FEW = 20
# Beyond such a ratio of the longest to the shortest the short ones would be invisible.
LOG_FROM = 25.0
Style = Literal["own", "base", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"]
_OTHERS: tuple[Style, ...] = ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8")


@dataclass(frozen=True)
class Axis:
    """From values to shares of a length."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Between 0 and 1; what lies outside is brought to the end."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within, at most so many."""
        return self._log_ticks(most) if self.log else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / (most - 1)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * x for x in (1, 2, 5, 10) if unit * x >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = self._within(d * 10.0**n for n in decades for d in digits)
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]

    def _within(self, values: Iterable[float]) -> list[float]:
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def _spanning(values: Sequence[float], *, zero: bool = True) -> Axis:
    """An axis that shows all values: from zero, or logarithmic where they differ too much."""
    low, high = min(values), max(values)
    if not zero or (low > 0 and high / low > LOG_FROM):
        room = (high / low) ** 0.06 * 1.05
        return Axis(low / room, high * room, log=True)
    return Axis(0.0, high * 1.02)


def _svg(height: float, title: str, desc: str, body: Iterable[str]) -> Markup:
    return Markup(
        '<svg class="chart" width="100%" height="{}" role="img" aria-label="{}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(f"{height:.0f}", title, title, desc, Markup("".join(body)))


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """Of percents across and points down."""
    return f'<line class="{style}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return (
        f'<rect class="{style}" x="{x:.2f}%" y="{y:.1f}" width="{max(width, 0.3):.2f}%" '
        f'height="{height}" rx="1.5"/>'
    )


def _dot(x: float, y: float, style: str, said: str = "", radius: float = 4.5) -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<circle class="{style}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius}">{title}</circle>'


def _text(
    x: float, y: float, said: str, style: str = "", *, anchor: str = "start", dx: float = 0
) -> str:
    return (
        f'<text class="{style}" x="{x:.2f}%" y="{y:.1f}" dx="{dx}" text-anchor="{anchor}">'
        f"{escape(said)}</text>"
    )


def _wrapped(name: str, y: float, style: str) -> tuple[list[str], float]:
    """A name on as many lines as it takes, and where the next thing goes."""
    lines = textwrap.wrap(name, WRAP) or [""]
    found = [_text(0, y + LINE * (n + 0.75), line, style) for n, line in enumerate(lines)]
    return found, y + LINE * len(lines) + 3


def _lane(axis: Axis, bottom: float, said: Callable[[float], str]) -> list[str]:
    """Lines of a grid behind bars or dots, and what they stand for."""
    found = []
    for tick in axis.ticks():
        x = LANE * axis.at(tick)
        anchor = "start" if x < 4 else "middle"
        found += [
            _line(x, 0, x, bottom, "grid"),
            _text(x, bottom + 15, _short(said(tick)), "quiet", anchor=anchor),
        ]
    return found


def _short(tick: str) -> str:
    """A round number without the noughts behind its point."""
    return re.sub(r"\.0+(?!\d)|(\.\d*[1-9])0+(?!\d)", r"\1", tick)


@dataclass(frozen=True)
class Bar:
    """A contender of `bars`.

    Attributes:
        name: of it.
        kind: that colours it.
        seconds: of its rounds; none where it was not timed.
        said: beside it: its figures, or what became of it.
        floor: seconds the hardware needs at least.
    """

    name: str
    kind: Kind
    seconds: Sequence[float]
    said: str
    floor: float | None = None


def bars(contenders: Sequence[Bar], *, title: str) -> Markup:
    """Median of each contender as a bar, its rounds on it, its floor as a mark.

    Few rounds are drawn one by one, many as a line from the fastest to the slowest that is thick
    between the quartiles. A round far beyond every median is cut off with an arrow.
    """
    timed = [each for each in contenders if each.seconds]
    medians = {id(each): quartiles(each.seconds)[1] for each in timed}
    floors = [each.floor for each in timed if each.floor]
    top = max(medians.values(), default=1.0)
    slowest = max((max(each.seconds) for each in timed), default=1.0)
    shown = [*medians.values(), min(slowest, 1.3 * top)]
    # A floor far below is a mark at the left end; for its sake alone no axis is logarithmic.
    axis = _spanning([*shown, *(floors if is_log(contenders) else [])])
    body: list[str] = []
    y = 0.0
    for each in contenders:
        found, y = _wrapped(each.name, y, "name own-name" if each.kind == "own" else "name")
        body += found
        middle = y + BAR / 2
        if not each.seconds:
            body.append(_text(0, middle + 4, each.said, "bad"))
            y += BAR + GAP
            continue
        median = medians[id(each)]
        body.append(_rect(0, y, LANE * axis.at(median), BAR, each.kind))
        body += _spread(each.seconds, axis, middle)
        if each.floor:
            x = LANE * axis.at(each.floor)
            body.append(_line(x, y - 3, x, y + BAR + 3, "floor"))
        end = LANE * axis.at(max(median, min(max(each.seconds), axis.high)))
        body.append(_text(end, middle + 4.5, each.said, "value", dx=9))
        y += BAR + GAP
    if timed:
        body[:0] = _lane(axis, y - 4, words.seconds)
    said = "; ".join(f"{each.name}: {each.said}" for each in contenders)
    return _svg(y + (AXIS if timed else 0), title, said, body)


def is_log(contenders: Sequence[Bar]) -> bool:
    """Whether `bars` draws them on a logarithmic axis."""
    values = [quartiles(each.seconds)[1] for each in contenders if each.seconds]
    return bool(values) and max(values) / min(values) > LOG_FROM


def _spread(seconds: Sequence[float], axis: Axis, y: float) -> list[str]:
    low, _, high = quartiles(seconds)
    ends = [LANE * axis.at(value) for value in (min(seconds), max(seconds))]
    found = [_line(ends[0], y, ends[1], y, "whisker")]
    if len(seconds) < FEW:
        found += [_dot(LANE * axis.at(value), y, "round", radius=1.8) for value in seconds]
    else:
        found.append(_line(LANE * axis.at(low), y, LANE * axis.at(high), y, "box"))
    if max(seconds) > axis.high:
        found.append(_text(LANE, y + 4, "›", "quiet"))
    return found


@dataclass(frozen=True)
class Rung:
    """A case of a `ladder`.

    Attributes:
        name: of it.
        dots: (kind, floors, what it is) of its contenders.
        said: beside it.
        bad: whether that is a failure of the package.
    """

    name: str
    dots: Sequence[tuple[Kind, float, str]]
    said: str
    bad: bool = False


def ladder(rungs: Sequence[Rung], *, title: str) -> Markup:
    """One line a case, its contenders as dots by how many floors they take; 1 is the limit.

    Two charts on the same axis, which stand side by side where there is room for both.
    """
    axis = _spanning([1.0, *(value for rung in rungs for _, value, _ in rung.dots)], zero=False)
    half = math.ceil(len(rungs) / 2)
    parts = [part for part in (rungs[:half], rungs[half:]) if part]
    return Markup("").join(_ladder(part, axis, title) for part in parts)


def _ladder(rungs: Sequence[Rung], axis: Axis, title: str) -> Markup:
    body: list[str] = []
    y = 0.0
    for rung in rungs:
        found, y = _wrapped(rung.name, y, "name halo")
        body += found
        middle = y + 6
        places = [LANE * axis.at(value) for _, value, _ in rung.dots]
        if places:
            body.append(_line(min(places), middle, max(places), middle, "rung"))
        # The package's last, so that it is never under another's.
        for kind, value, said in sorted(rung.dots, key=lambda dot: dot[0] == "own"):
            body.append(_dot(LANE * axis.at(value), middle, kind, said, 5.5))
        body.append(_text(LANE, middle + 4.5, rung.said, "bad" if rung.bad else "value", dx=12))
        y += 6 + GAP + 4
    limit = LANE * axis.at(1.0)
    grid = [*_lane(axis, y, words.digits), _line(limit, 0, limit, y, "floor")]
    desc = "; ".join(f"{rung.name}: {rung.said}" for rung in rungs)
    return _svg(y + AXIS, title, desc, [*grid, *body])


@dataclass(frozen=True)
class Plot:
    """A plot with the names and styles of what is in it, and what else to say under it."""

    svg: Markup
    key: tuple[tuple[str, str], ...]
    note: str = ""


def _frame(
    x: Axis,
    y: Axis,
    *,
    x_said: Callable[[float], str],
    y_said: Callable[[float], str],
    x_name: str,
    y_name: str,
    x_ticks: Sequence[float] | None = None,
) -> list[str]:
    """Grid, ticks and names of two axes."""
    found = [_text(0, 12, y_name, "quiet"), _text(RIGHT, HEIGHT - 4, x_name, "quiet", anchor="end")]
    for tick in y.ticks(6):
        height = _down(y, tick)
        found += [
            _line(LEFT, height, RIGHT, height, "grid"),
            _text(LEFT, height + 4, _short(y_said(tick)), "quiet", anchor="end", dx=-6),
        ]
    for tick in x.ticks(5) if x_ticks is None else x_ticks:
        place = _across(x, tick)
        anchor = "end" if place > RIGHT - 4 else "middle"
        found += [
            _line(place, TOP, place, HEIGHT - BOTTOM, "grid"),
            _text(place, HEIGHT - BOTTOM + 16, _short(x_said(tick)), "quiet", anchor=anchor),
        ]
    return found


def _across(axis: Axis, value: float) -> float:
    return LEFT + (RIGHT - LEFT) * axis.at(value)


def _down(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * axis.at(value)


def _styles(names: Sequence[tuple[str, Kind]]) -> dict[str, Style]:
    """The baseline grey, the package's first in its colour, all others in colours of their own."""
    found: dict[str, Style] = {}
    rest = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    for name, kind in names:
        if kind == "base":
            found[name] = "base"
        elif kind == "own" and "own" not in found.values():
            found[name] = "own"
        else:
            found[name] = next(rest)
    return found


def _curve(points: Sequence[tuple[float, float]], style: str) -> list[str]:
    return [_line(*start, *end, f"curve {style}") for start, end in pairwise(points)]


def latency(contenders: Sequence[tuple[str, Kind, Sequence[float]]], *, title: str) -> Plot:
    """How much slower than usual, and how often: seconds by their median against the percentile.

    The slow end is stretched. A contender's line ends at the last percentile that its number of
    rounds can show; who has too few for p95 has none.
    """
    shown = [each for each in contenders if len(each[2]) >= ENOUGH[95]]
    styles = _styles([(name, kind) for name, kind, _ in shown])
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, _, seconds in shown:
        steps = np.linspace(0, _tail(99 if len(seconds) >= ENOUGH[99] else 95), 61)
        values = np.percentile(seconds, 100 - 100 / 10**steps) / np.median(seconds)
        curves[name] = steps.tolist(), values.tolist()
    x = Axis(0.0, max(steps[-1] for steps, _ in curves.values()))
    every = [value for _, values in curves.values() for value in values]
    y = Axis(min(every) - 0.01, max(every) + 0.01)
    body = _frame(
        x, y,
        x_said=lambda tick: f"p{100 - 100 / 10**tick:.0f}" if tick else "fastest",
        y_said=lambda tick: f"{tick:.2f}",
        x_name="percentile of the rounds", y_name="times its own median",
        x_ticks=[tail for tail in map(_tail, (0, 50, 90, 95, 99)) if tail <= x.high + 1e-9],
    )  # fmt: skip
    key = []
    for name, _, seconds in shown:
        places = [(_across(x, at), _down(y, v)) for at, v in zip(*curves[name], strict=True)]
        body += _curve(places, styles[name])
        said = []
        for percent in (50, 95, 99):
            value = percentile(seconds, percent)
            if value is not None:
                said.append(f"p{percent} {words.seconds(value)}")
                relative = value / float(np.median(seconds))
                place = _across(x, _tail(percent)), _down(y, relative)
                body.append(_dot(*place, styles[name], f"{name}: {said[-1]}", 3.5))
        key.append((styles[name], f"{name}: {', '.join(said)}"))
    return Plot(_svg(HEIGHT, title, "; ".join(text for _, text in key), body), tuple(key))


def _tail(percent: float) -> float:
    """0 for p0, 1 for p90, 2 for p99."""
    return -math.log10(1 - percent / 100)


def scaling(
    contenders: Sequence[tuple[str, Kind, Sequence[tuple[float, float]]]],
    *,
    title: str,
    x_name: str,
) -> Plot:
    """Median seconds against a number of the cases, both logarithmic, with the fitted power."""
    styles = _styles([(name, kind) for name, kind, _ in contenders])
    every = [point for _, _, points in contenders for point in points]
    x = _spanning([at for at, _ in every], zero=False)
    y = _spanning([value for _, value in every], zero=False)
    body = _frame(
        x, y, x_said=_number, y_said=words.seconds, x_name=x_name, y_name="seconds of one run"
    )
    key = []
    for name, _, points in contenders:
        style, fit = styles[name], exponent(points)
        if fit is not None:
            ends = [min(at for at, _ in points), max(at for at, _ in points)]
            fitted = [fit.constant * at**fit.exponent for at in ends]
            places = [
                (_across(x, at), _down(y, value)) for at, value in zip(ends, fitted, strict=True)
            ]
            body += _curve(places, style)
        for at, value in points:
            said = f"{name}: {words.seconds(value)} at {_short(_number(at))}"
            body.append(_dot(_across(x, at), _down(y, value), style, said))
        key.append((style, f"{name}: {power(fit)}"))
    return Plot(_svg(HEIGHT, title, "; ".join(text for _, text in key), body), tuple(key))


def power(fit: Fit | None) -> str:
    """How the cost grows, in words."""
    if fit is None:
        return "too few sizes for an exponent"
    return f"grows with the power {fit.exponent:.2f} ± {fit.error:.2f}"


def _number(value: float) -> str:
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{words.digits(value / factor)}{unit}"
    return words.digits(value)


@dataclass(frozen=True)
class Point:
    """A contender of `roofline` or `shares`: where it lies, whose it is, what it is."""

    x: float
    y: float
    kind: Kind
    said: str


_WHOSE: tuple[tuple[Kind, str], ...] = (
    ("own", "ulae_rt"), ("base", "baseline"), ("other", "others"),
)  # fmt: skip


def _points(points: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    # The package's last, so that they are never under another's.
    ordered = sorted(points, key=lambda point: point.kind == "own")
    return [_dot(_across(x, p.x), _down(y, p.y), p.kind, p.said) for p in ordered]


def _whose(points: Sequence[Point]) -> tuple[tuple[str, str], ...]:
    kinds = {point.kind for point in points}
    return tuple((kind, name) for kind, name in _WHOSE if kind in kinds)


def roofline(
    points: Sequence[Point], *, copy: float, rates: Sequence[tuple[str, float]], title: str
) -> Plot:
    """FLOP/s against FLOP a byte, under what the copy bandwidth and the matrix rates allow.

    Args:
        points: x in FLOP/byte, y in FLOP/s.
        copy: bytes/s of a large copy.
        rates: FLOP/s of large matrices, by precision.
        title: of the chart.
    """
    best = max(rate for _, rate in rates)
    ridges = [rate / copy for _, rate in rates]
    x = _spanning([*ridges, *(point.x for point in points)], zero=False)
    y = _spanning([best, copy * x.low, *(point.y for point in points)], zero=False)
    body = _frame(
        x, y, x_said=words.digits, y_said=_number, x_name="FLOP per byte that must move",
        y_name="FLOP/s",
    )  # fmt: skip
    slope = [(at, min(at * copy, best)) for at in (max(x.low, y.low / copy), best / copy)]
    body += _curve([(_across(x, at), _down(y, value)) for at, value in slope], "roof")
    names: list[tuple[float, float, str]] = []
    for name, rate in sorted(rates, key=lambda each: each[1]):
        height = _down(y, rate)
        places = [(_across(x, rate / copy), height), (RIGHT, height)]
        body += _curve(places, "roof")
        # Two rates that lie too close for two texts share one.
        if names and abs(names[-1][1] - height) < LINE:
            names[-1] = *places[0], f"{names[-1][2]}, {name}"
        else:
            names.append((*places[0], name))
    body += _points(points, x, y)
    # Where a roof begins, which is far to the left of what does much with its bytes.
    for place, height, name in names:
        anchor = "start" if place < 75 else "end"
        body.append(_text(place, height - 6, name, "quiet halo", anchor=anchor))
    desc = "; ".join(point.said for point in points)
    key = (
        *_whose(points),
        ("roof", f"allowed: copy {words.bandwidth(copy)}, matrices by precision"),
    )
    return Plot(_svg(HEIGHT, title, desc, body), key)


def shares(points: Sequence[Point], *, title: str) -> Plot:
    """Bandwidth reached, as a share of a large copy's, against the bytes that must move."""
    x = _spanning([point.x for point in points], zero=False)
    y = Axis(0.0, max(1.05, *(point.y for point in points)))
    body = _frame(
        x, y, x_said=words.size, y_said=words.percent, x_name="bytes that must move",
        y_name="of the copy bandwidth",
    )  # fmt: skip
    body.append(_line(LEFT, _down(y, 1.0), RIGHT, _down(y, 1.0), "roof"))
    body += _points(points, x, y)
    key = (*_whose(points), ("roof", "a large copy in the same run"))
    return Plot(_svg(HEIGHT, title, "; ".join(point.said for point in points), body), key)


def stages(contenders: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, title: str) -> Plot:
    """Median seconds of each stage, one after the other, a line a contender."""
    names = dict.fromkeys(stage for _, parts in contenders for stage, _ in parts)
    styles = {name: f"p{number % 8}" for number, name in enumerate(names)}
    longest = max(sum(value for _, value in parts) for _, parts in contenders)
    axis = Axis(0.0, longest * 1.02 or 1.0)  # a stage that is skipped takes no time
    body: list[str] = []
    y = 0.0
    for contender, parts in contenders:
        found, y = _wrapped(contender, y, "name")
        body += found
        start = 0.0
        for stage, value in parts:
            width = LANE * axis.at(value)
            body.append(_rect(start, y, width, BAR, styles[stage]))
            start += width
        whole = words.seconds(sum(value for _, value in parts))
        body.append(_text(start, y + BAR / 2 + 4.5, whole, "value", dx=9))
        y += BAR + GAP
    body[:0] = _lane(axis, y - 4, words.seconds)
    desc = "; ".join(
        f"{contender}: {', '.join(f'{stage} {words.seconds(value)}' for stage, value in parts)}"
        for contender, parts in contenders
    )
    return Plot(_svg(y + AXIS, title, desc, body), tuple((styles[n], n) for n in names))
