import pytest

from ulae_rt.strict_json import parse_json


def test_what_json_has_is_read() -> None:
    text = '{"a": [1, 2.5, null, true], "b": {"a": "x"}}'
    assert parse_json(text) == {"a": [1, 2.5, None, True], "b": {"a": "x"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ('{"a": ' * 100_000, "too deep"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_what_is_doubtful_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
