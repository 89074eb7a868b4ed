"""The README's figures: of the right records, short, and only between its marks."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.record import ROOT, Record
from report import blocks
from report.readme import MOST_ROWS, is_current, section


def tables(text: str) -> list[list[str]]:
    """Rows of each table, without its head."""
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    return [lines[2:] for lines in parts]


def test_a_heading_and_a_table_for_each_machine(cpu: Record, gpu: Record) -> None:
    text = section([cpu, gpu])
    assert "**Xeon, 2 cores**, 2026-11-23, 0123abcde:" in text
    assert "**NVIDIA H200**, 2026-11-23, 0123abcde:" in text
    first, second = tables(text)
    assert any("ulae_rt bf16" in row and "released (" in row and "1.29 GB" in row for row in first)
    assert any("Files to files, batch" in row for row in first)
    assert any("geometric mean of 14 cases, of 16" in row for row in second)
    assert "fused" not in text
    assert "cubed" not in text


def test_of_each_machine_its_newest_full_and_clean_record(cpu: Record) -> None:
    day = "2026-11-{:02}T00:00:00+00:00".format
    records = [
        replace(cpu, started=day(5), commit="dirty", dirty=True),
        replace(cpu, started=day(2), commit="newest"),
        replace(cpu, started=day(1), commit="old"),
        replace(cpu, started=day(9), commit="small", small=True),
    ]
    assert "newest" in section(records)
    assert section(records).count("**") == 2
    assert "dirty, with files changed" in section(records[:1])
    assert section(records[3:]) == ""


def test_no_more_rows_than_allowed_and_every_headline_before_a_second(gpu: Record) -> None:
    cases = [
        replace(case, suite=f"suite {number}", own=("ulae_rt bf16", "released, compiled"))
        for case in gpu.cases[-2:-1]
        for number in range(7)
    ]
    (rows,) = tables(section([replace(gpu, cases=cases)]))
    assert len(rows) == MOST_ROWS
    assert sum("ulae_rt bf16" in row for row in rows) == 7


def test_a_block_stands_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n<!-- a -->\nold\n<!-- /a -->\n\n<!-- b -->\n<!-- /b -->\n")
    assert blocks.get(readme, "a") == "old"
    blocks.put(readme, "a", "new\n\nlines")
    assert blocks.get(readme, "a") == "new\n\nlines"
    assert readme.read_text() == (
        "before\n\n<!-- a -->\nnew\n\nlines\n<!-- /a -->\n\n<!-- b -->\n<!-- /b -->\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


START, END = "<!-- a -->", "<!-- /a -->"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", rf"README\.md: {START} stands in it 0 times, expected once; put it"),
        (START, rf"README\.md: {END} stands in it 0 times"),
        (f"{START}{START}{END}", rf"{START} stands in it 2 times"),
        (f"{START}{END}{END}", rf"{END} stands in it 2 times"),
        (f"{END}{START}", "the reverse; swap them"),
    ],
)
def test_missing_or_doubled_marks_are_refused(content: str, message: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(content)
    with pytest.raises(ValueError, match=message):
        blocks.put(readme, "a", "text")
    with pytest.raises(ValueError, match=message):
        blocks.get(readme, "a")
    assert readme.read_text() == content


def test_the_readme_shows_the_newest_records() -> None:
    assert is_current(ROOT / "README.md")
