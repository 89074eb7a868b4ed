"""The page and the Markdown: whole, self-contained, safe to open, and nothing in them is hidden."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from harness.case import Outcome
from harness.record import Record
from report import text
from report.charts import WRAP, Axis, Bar, bars
from report.make import main, write_report
from report.markdown import markdown
from report.page import page

VOID = {"meta", "br"}
ODD = "<script>alert('1')</script> & \"x\" onload='y' {{ 7 * 7 }} | ` \U0001f9e0"


class Page(HTMLParser):
    """What a page holds; fails where an element is not closed as it was opened."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.pieces: list[str] = []
        self.rows: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)
        if "tr" in self.open:
            self.rows[-1] += f"{data} "


@pytest.fixture(params=["cpu", "gpu"])
def record(request: pytest.FixtureRequest) -> Record:
    found: Record = request.getfixturevalue(request.param)
    return found


def hostile(record: Record) -> Record:
    """The record with a name that is markup wherever there is a name."""
    cases = [
        replace(
            case,
            name=f"{ODD} {case.name}",
            baseline=f"{ODD} {case.baseline}",
            own=tuple(f"{ODD} {name}" for name in case.own),
            goal=ODD,
            series=case.series and ODD,
            contenders={
                f"{ODD} {name}": replace(outcome, why=outcome.why and ODD)
                for name, outcome in case.contenders.items()
            },
        )
        for case in record.cases
    ]
    machine = {**record.machine, "title": ODD}
    return replace(record, cases=cases, machine=machine, command=ODD, left_out={ODD: ODD})


def test_every_contender_and_every_reason_stands_in_both(record: Record) -> None:
    rows = Page(page(record, None)).rows
    lines = markdown(record).splitlines()
    for case in record.cases:
        for name, outcome in case.contenders.items():
            for found in (rows, lines):
                assert any(name in row and outcome.why in row for row in found)
    for why in record.left_out.values():
        assert any(why in line for line in lines)
        assert why in Page(page(record, None)).text


def test_the_page_needs_nothing_else(record: Record) -> None:
    found = Page(page(record, None))
    for tag, name, value in found.attributes:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "action", "data"):
            assert value is not None
            assert value.startswith("#")
    assert not re.search(r"@import|url\(", page(record, None))
    assert "default-src 'none'" in page(record, None)


def test_links_lead_somewhere(record: Record) -> None:
    found = Page(page(record, None)).attributes
    ids = [value for _, name, value in found if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value for _, name, value in found if name == "href"} <= {f"#{each}" for each in ids}


def test_names_that_are_markup_are_text(record: Record) -> None:
    source = page(hostile(record), None)
    found = Page(source)
    assert "<script" not in source
    assert "49" not in {piece.strip() for piece in found.pieces}
    assert "alert('1')" in found.text
    assert all(name != "onload" for _, name, _ in found.attributes)
    lines = markdown(hostile(record)).splitlines()
    assert not any("<script" in line for line in lines if line.startswith(("|", "#")))
    # A name must not end a cell.
    for before, after in pairwise(lines):
        if before.startswith("|") and after.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", before)) == len(re.findall(r"(?<!\\)\|", after))


def test_charts_are_well_formed_and_say_what_they_show(record: Record) -> None:
    charts = re.findall(r"<svg.*?</svg>", page(hostile(record), None), flags=re.DOTALL)
    assert len(charts) > 3
    for chart in charts:
        root = ET.fromstring(chart)
        assert root.get("role") == "img"
        assert root.findtext("title")
        assert root.findtext("desc")
        for each in root.iter():
            for name in ("x", "x1", "x2", "cx", "width"):
                value = each.get(name, "0%")
                assert 0 <= float(value.removesuffix("%")) <= 100


def test_long_names_are_broken_into_lines_and_nothing_overlaps() -> None:
    contenders = [Bar(name, "own", [1.0], "1 s") for name in ("word " * 30, "x" * 95)]
    chart = ET.fromstring(bars(contenders, title="long"))
    lines = [each for each in chart.iter("text") if "name" in each.get("class", "")]
    assert all(len(each.text or "") <= WRAP for each in lines)
    assert len(lines) == 4 + 3
    boxes = [(float(e.get("y", 0)), float(e.get("height", 0))) for e in chart.iter("rect")]
    for top, height in boxes:
        assert not any(top < float(line.get("y", 0)) - 1 < top + height for line in lines)


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0.0, 10.0), [0, 5, 10]),
        (Axis(0.0, 0.8), [0, 0.2, 0.4, 0.6, 0.8]),
        (Axis(0.9, 40.0, log=True), [1, 2, 5, 10, 20]),
        (Axis(0.9, 400.0, log=True), [1, 10, 100]),
        (Axis(1e-6, 1.0, log=True), [1e-6, 1e-4, 1e-2, 1.0]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


def test_the_top_says_how_fast_and_against_what(cpu: Record, gpu: Record) -> None:
    found = Page(page(cpu, None)).text
    start = found[: found.index("Both images in")]
    assert re.search(r"Network (4\.\d|5\.\d)× as fast as released", start)
    assert "ulae_rt fp32" in start
    found = Page(page(gpu, None)).text
    assert re.search(r"Kernels (9\.\d|1\d)× as fast as released, eager", found)
    assert "geometric mean of 14 cases, of 16" in found


def test_a_contender_that_does_not_run_is_no_headline(cpu: Record) -> None:
    case = cpu.cases[0]
    failed = {name: Outcome("failed", "it broke") for name in case.own}
    record = replace(cpu, cases=[replace(case, contenders={**case.contenders, **failed})])
    start = Page(page(record, None)).text
    assert "failed: it broke" in start[: start.index("Both images in")]


def test_percentiles_only_where_there_are_rounds_for_them(cpu: Record, gpu: Record) -> None:
    assert "| p95 |" not in markdown(cpu)
    lines = [line for line in markdown(gpu).splitlines() if "released, compiled" in line]
    head = next(line for line in markdown(gpu).splitlines() if "| p99 |" in line)
    columns = [cell.strip() for cell in head.split("|")]
    for line in lines:  # thirty rounds
        cells = dict(zip(columns, (cell.strip() for cell in line.split("|")), strict=True))
        assert cells["p95"] != "-"
        assert cells["p99"] == "-"


def test_dirty_and_small_runs_say_so(cpu: Record) -> None:
    for made in (page, lambda record, _: markdown(record)):
        plain = made(cpu, None)
        assert "with files changed" not in plain
        assert text.SMALL not in plain
        assert "with files changed" in made(replace(cpu, dirty=True), None)
        assert text.SMALL in made(replace(cpu, small=True), None)


def test_an_earlier_record_is_compared(cpu: Record) -> None:
    earlier = replace(cpu, started="2026-11-20T00:00:00+00:00", commit="earlier00")
    found = Page(page(cpu, earlier)).text
    assert "Against 2026-11-20, earlier00" in found
    assert "0 slower" in found
    assert "Against" not in Page(page(cpu, None)).text


def test_an_empty_record_and_one_round(cpu: Record, gpu: Record) -> None:
    for record in (cpu, gpu):
        Page(page(replace(record, cases=[]), None))
        one = [
            replace(
                case,
                contenders={
                    name: replace(outcome, seconds=outcome.seconds[:1], hot=outcome.hot[:1])
                    for name, outcome in case.contenders.items()
                },
            )
            for case in record.cases
        ]
        Page(page(replace(record, cases=one), None))
        # Without ceilings there are no floors, and nothing else is missing.
        bare = replace(record, copy_bytes_per_second=0.0, matmul_flops_per_second={})
        Page(page(bare, None))
        assert "floors |" not in markdown(bare)
        assert "floor " not in markdown(bare).split("## Method")[0]


def test_reports_are_written_beside_their_record(cpu: Record, tmp_path: Path) -> None:
    earlier = replace(cpu, started="2026-11-20T00:00:00+00:00", commit="earlier00")
    small = replace(cpu, started="2026-11-21T00:00:00+00:00", commit="small0000", small=True)
    for record in (earlier, small, cpu):
        record.write(tmp_path / f"{record.stem}.json")
    made = write_report(tmp_path / f"{cpu.stem}.json")
    assert [path.name for path in made] == [f"{cpu.stem}.md", f"{cpu.stem}.html"]
    assert made[0].read_text(encoding="utf-8") == markdown(cpu)
    assert made[1].read_text(encoding="utf-8") == page(cpu, earlier)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # The first has nothing to be compared with, and a small one nothing to compare.
    for stem in (earlier.stem, small.stem):
        _, html = write_report(tmp_path / f"{stem}.json")
        assert "Against" not in Page(html.read_text(encoding="utf-8")).text


def test_the_command_writes_and_refuses(
    cpu: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu.write(tmp_path / "record.json")
    assert main([str(tmp_path / "record.json")]) == 0
    assert "record.html" in capsys.readouterr().out
    assert main([str(tmp_path / "record.md")]) == 2
    assert "is no record" in capsys.readouterr().err
    assert main([]) == 2
