"""CSV that is doubtful is refused in one line."""

import pytest

from ulae_rt.strict_csv import csv_rows, decode_text, separator


def test_rows_with_their_lines():
    text = 'a, "b, c", d\r\n\r\n , ,\r\n"e ""f""",g,\r\n'
    assert list(csv_rows(text)) == [(1, ["a", "b, c", "d"]), (4, ['e "f"', "g", ""])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,"b\n', "line 1: is no CSV: unexpected end of data"),
        ('a,b\nc,"d"e\n', "line 2: is no CSV: .*expected after"),
        ('a,"b\nc",d\n', "line 2: a field goes over several lines; is a quote missing"),
        (f"a,{'b' * 140_000}\n", "line 1: is no CSV: field larger than field limit"),
    ],
)
def test_what_is_no_csv(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(csv_rows(text))
    assert "\n" not in str(caught.value)


def test_text_of_other_encodings():
    assert decode_text("\ufeffä".encode()) == "ä"
    for encoding in ("utf-16", "utf-16-be"):
        mark = b"" if encoding == "utf-16" else b"\xfe\xff"
        with pytest.raises(ValueError, match="it is UTF-16 text, expected UTF-8"):
            decode_text(mark + "id,x".encode(encoding))
    with pytest.raises(ValueError, match="it is not UTF-8 text: line 2"):
        decode_text("a\nä".encode("latin-1"))
    with pytest.raises(ValueError, match="it has a zero byte in line 3"):
        decode_text(b"a\nb\n\0")


def test_separators_that_are_no_commas():
    assert separator("id;x;y") == "semicolons"
    assert separator("id\tx") == "tabs"
    assert separator("id,x;y") is None
    assert separator("id") is None
