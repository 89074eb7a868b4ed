"""Parts of a README that are written by a program: what stands between two marks."""

from pathlib import Path

from harness.files import write_whole


def put(readme: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: the marks do not stand in it, once each, in their order.
    """
    before, _, after = _parts(readme, name)
    start, end = _marks(name)
    write_whole(readme, f"{before}{start}\n{text}\n{end}{after}")


def get(readme: Path, name: str) -> str:
    """What stands there, as `put` was given it.

    Raises:
        ValueError: as by `put`.
    """
    return _parts(readme, name)[1].removeprefix("\n").removesuffix("\n")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def _parts(readme: Path, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks."""
    content = readme.read_text(encoding="utf-8")
    start, end = _marks(name)
    for mark in (start, end):
        number = content.count(mark)
        if number != 1:
            raise ValueError(
                f"{readme.name}: {mark} stands in it {number} times, expected once; put it on a "
                "line of its own where the figures belong"
            )
    before, rest = content.split(start)
    if end not in rest:
        raise ValueError(
            f"{readme.name}: expected {start} before {end}, got the reverse; swap them"
        )
    between, after = rest.split(end)
    return before, between, after
