"""CSV as every reader of this package takes it: what is doubtful is refused, not guessed at."""

import csv
import io
from collections.abc import Iterator

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SEPARATORS = {";": "semicolons", "\t": "tabs"}


def decode_text(data: bytes) -> str:
    """The text of a whole file: UTF-8, with or without the mark that Excel begins files with.

    Raises:
        ValueError: another encoding, or bytes that are no text. The message is one line.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {encoding} text, expected UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"it is not UTF-8 text: line {line}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"it has a zero byte in line {line}")
    return text


def separator(header: str) -> str | None:
    """What a table's first line is separated by where that is no comma, in words."""
    if "," in header:
        return None
    return next((name for sign, name in _SEPARATORS.items() if sign in header), None)


def csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the numbers of their last lines; cells are stripped.

    A field may be quoted after a space, as in ``a, "b, c"``.

    Raises:
        ValueError: no CSV: a quote that is not closed or closed too early, a field longer than
            131072 characters or over several lines. The message is one line and has the number
            of the text's line.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise ValueError(
                    f"line {reader.line_num}: a field goes over several lines; is a quote missing?"
                )
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: is no CSV: {error}") from None
