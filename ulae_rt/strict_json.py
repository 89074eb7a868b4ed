"""JSON as every reader of this package takes it: what is doubtful is refused, not guessed at."""

import json
import math
from typing import Any, NoReturn


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text strictly.

    Python's own parser takes ``NaN`` and ``Infinity``, keeps the last of two equal keys, and
    fails with RecursionError where objects are nested too deep.

    Args:
        text: of the whole file; bytes are UTF-8.

    Raises:
        ValueError: not JSON, a number that is not finite, a key that an object has twice, or
            nesting that is too deep. The message is one line.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
