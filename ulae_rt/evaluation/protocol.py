"""Which labels count, and the areas they are averaged in: a TOML file for each data set."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import EvaluationError
from ulae_rt.strict_csv import decode_text

# Those that the package brings.
PROTOCOLS = ("oasis", "mindboggle101", "ixi")
_KEYS = {"title", "average", "scans", "label_maps", "groups", "merge", "names"}
_HINT = f"see the package's own: ulae_rt/evaluation/protocols/{PROTOCOLS[0]}.toml"


@dataclass(frozen=True)
class Protocol:
    """How a data set's label maps are compared.

    Attributes:
        title: for people.
        groups: the labels of each area; empty where every label counts that both maps have.
        average: the areas whose mean is the average of the paper's Table 1.
        names: of labels.
        merge: labels that count as another one.
        scans, label_maps: the data set's files in a folder, with ``{id}`` for the person.
    """

    title: str
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    average: tuple[str, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    merge: Mapping[int, int] = field(default_factory=dict)
    scans: str = ""
    label_maps: str = ""

    @classmethod
    def of_labels(cls, labels: Sequence[int] | None = None) -> Self:
        """Just these labels; None: every label that both maps have."""
        if labels is None:
            return cls("every label that both maps have")
        return cls(f"{len(labels)} labels", {"asked": tuple(sorted(set(labels)))})

    @property
    def labels(self) -> tuple[int, ...] | None:
        """Every label of a group, ascending; None where there are no groups."""
        return tuple(sorted({k for each in self.groups.values() for k in each})) or None

    def indexed(
        self, *maps: NDArray[np.integer]
    ) -> tuple[tuple[int, ...], list[NDArray[np.int32]]]:
        """Label maps with places in a list of labels for values, 0 for all else.

        Args:
            maps: non-negative integers, any shape.

        Returns:
            The labels, and maps in which ``i + 1`` stands for the i-th of them.
        """
        labels = self.labels
        if labels is None:
            found = set().union(*(np.unique(each).tolist() for each in maps))
            labels = tuple(sorted(found - {0}))
        place = {label: i + 1 for i, label in enumerate(labels)}
        place |= {old: place[new] for old, new in self.merge.items()}
        keys = np.array([0, *sorted(place)])
        values = np.array([0, *(place[key] for key in keys[1:].tolist())], np.int32)
        # Not by a table of all values: some atlases number their labels by hundreds of millions.
        at = [np.searchsorted(keys[:-1], each) for each in maps]
        return labels, [
            np.where(keys[i] == each, values[i], np.int32(0))
            for i, each in zip(at, maps, strict=True)
        ]


def read_protocol(source: str) -> Protocol:
    """Read a protocol.

    Args:
        source: one of `PROTOCOLS`, or the path of a TOML file like theirs: ``title``; a table
            ``[groups.AREA]`` with ``labels`` for each area; as wanted ``average``, a list of
            areas; ``[merge]`` with ``NEW = [OLD, ...]``; ``[names]`` with ``LABEL = "..."``;
            ``scans`` and ``label_maps``, the pattern of the files' names.

    Raises:
        EvaluationError: no such protocol, or a file that is none.
    """
    if source in PROTOCOLS:
        text = (files("ulae_rt.evaluation") / "protocols" / f"{source}.toml").read_text("utf-8")
    else:
        path = Path(source)
        if path.suffix.lower() != ".toml":
            raise EvaluationError(
                f"there is no protocol {source!r}, expected {', '.join(PROTOCOLS)} or a .toml file",
                _HINT,
            )
        try:
            text = decode_text(path.read_bytes())
        except OSError as error:
            raise EvaluationError(
                f"{path} cannot be read: {error.strerror}", "check the path"
            ) from None
        except ValueError as error:
            raise EvaluationError(f"{path} cannot be read: {error}", "save it as UTF-8") from None
    try:
        return _parsed(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise EvaluationError(f"{source} is no TOML: {error}", _HINT) from None
    except RecursionError:
        raise EvaluationError(f"{source} is no TOML: it is nested too deep", _HINT) from None
    except (_Wrong, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(f"{source} is no protocol: {error}", _HINT) from None


class _Wrong(Exception):
    """What is wrong with a protocol."""


def _parsed(values: dict[str, Any]) -> Protocol:
    if unknown := sorted(values.keys() - _KEYS):
        raise _Wrong(f"{unknown[0]} is unknown, expected {', '.join(sorted(_KEYS))}")
    groups = {}
    for name, group in values.get("groups", {}).items():
        if not group.get("labels"):
            raise _Wrong(f"the group {name} has no labels")
        if unknown := sorted(group.keys() - {"labels", "title"}):
            raise _Wrong(f"the group {name} has the key {unknown[0]}, expected labels, title")
        groups[name] = tuple(_label(label, name) for label in group["labels"])
    if not groups:
        raise _Wrong("it has no groups")
    average = tuple(values.get("average", ()))
    if twice := sorted({str(name) for name in average if average.count(name) > 1}):
        raise _Wrong(f"average names the group {twice[0]} twice")
    if missing := [name for name in average if name not in groups]:
        raise _Wrong(f"average names the group {missing[0]}, which is not there")
    merge = {
        _label(old, "merge"): _label(int(new), "merge")
        for new, olds in values.get("merge", {}).items()
        for old in olds
    }
    for key in ("title", "scans", "label_maps"):
        if not isinstance(values.get(key, ""), str):
            raise _Wrong(f"{key} is {values[key]!r}, expected text")
    protocol = Protocol(
        str(values.get("title", "")),
        groups,
        average,
        {int(label): str(name) for label, name in values.get("names", {}).items()},
        merge,
        str(values.get("scans", "")),
        str(values.get("label_maps", "")),
    )
    known = set(protocol.labels or ())
    for old, new in merge.items():
        if new not in known or old in known:
            raise _Wrong(f"merge {new} = [{old}]: the first must be in a group, the other in none")
    return protocol


def _label(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _Wrong(f"{where} has the label {value!r}, expected a whole number from 1")
    return value
