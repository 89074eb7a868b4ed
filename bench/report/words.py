"""Figures as people read them: three digits that mean something, and their unit."""

from harness.case import Sizes

NONE = "-"


def digits(value: float) -> str:
    """Three significant digits, thousands set apart, never an exponent above one."""
    value = float(f"{value:.3g}")
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 1:
        return f"{value:.2f}"
    return f"{value:#.3g}" if value else "0"


def seconds(value: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    for least, factor, unit in ((1, 1, "s"), (1e-3, 1e3, "ms")):
        if value >= least:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e6)} µs" if value else "0 s"


def span(low: float, high: float) -> str:
    """Two times, with their unit said once where it is the same."""
    first, last = seconds(low), seconds(high)
    number, _, unit = first.partition(" ")
    return f"{number if last.endswith(f' {unit}') else first} to {last}"


def duration(value: float) -> str:
    """Of a whole run."""
    minutes, rest = divmod(round(value), 60)
    if minutes < 1:
        return f"{value:.0f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def times(value: float) -> str:
    """A ratio; no round is so steady that a third digit would mean anything."""
    rounded = float(f"{value:.2g}")
    if rounded >= 10:
        return f"{rounded:,.0f}×"
    return f"{rounded:.1f}×" if rounded >= 1 else f"{rounded:.2f}×"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"{digits(value / 1e3)} k{unit}"


def bandwidth(value: float) -> str:
    """Bytes a second."""
    return _scaled(value, "B/s")


def arithmetic(value: float) -> str:
    """FLOP a second."""
    return _scaled(value, "FLOP/s")


def work(flops: float) -> str:
    """FLOP."""
    return _scaled(flops, "FLOP")


def size(value: float) -> str:
    """Bytes."""
    return _scaled(value, "B")


def percent(share: float) -> str:
    """Of a share of one."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def error(value: float) -> str:
    """Two digits: an error is known no better."""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2g}"


def volume(sizes: Sizes, batch: int) -> str:
    """``160×192×160``, with how many pairs of them where there are several."""
    shape = "×".join(map(str, sizes))
    return shape if batch == 1 else f"{batch} pairs of {shape}"


def case(name: str, precision: str) -> str:
    """A case's name, with the precision where it does not say that itself."""
    return name if precision in name else f"{name}, {precision}"


def count(number: int, noun: str, several: str = "") -> str:
    """``1 case``, ``2 cases``."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"
