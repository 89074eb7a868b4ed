"""The sidecar of an engine: written by the exporter, checked by the runtime before it opens one.

One JSON file beside each artefact, ``<artefact stem>.json``. It says everything that is needed to
feed the artefact and to refuse one that is not what was verified.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from ulae_rt.arguments import what_is_at
from ulae_rt.errors import EngineMismatch
from ulae_rt.strict_json import parse_json

FORMAT_VERSION = 3
# Kind of artefact: the suffix of its file, and the precisions that it can have.
SUFFIX_OF = {"onnx": ".onnx", "tensorrt": ".engine", "tensorrt-rtx": ".engine", "pt2": ".pt2"}
KINDS = tuple(SUFFIX_OF)
PRECISIONS = ("fp32", "fp16", "bf16")
COMPATIBILITIES = ("none", "ampere-plus", "same-capability")
# What `ulae_rt.model` and `ulae_rt.imaging` know; manifests are read without either.
VARIANTS = ("paper", "release")
NORMALISATIONS = ("max", "p99.9")
VERIFIED = "verified"
NOT_RUN = "built, not run"
ANY_BATCH = -1  # in a shape: the artefact takes any number of pairs at once
LARGEST_SIZE = 2**14  # of an axis, which no scan reaches
# What every artefact takes and gives: name, and what its channels are.
TENSORS = {
    "moving": ("intensity",),
    "fixed": ("intensity",),
    "moved": ("intensity",),
    "disp": ("d", "h", "w"),
}

# And what its numbers count.
_INTENSITY = "intensity in [0, 1]"
UNITS = {
    "moving": _INTENSITY,
    "fixed": _INTENSITY,
    "moved": _INTENSITY,
    "disp": "voxels of the fixed grid; moved(p) = moving(p + disp(p))",
}

_LARGEST_FILE = 2**20  # bytes; a manifest has 4,000
# With what replaces the artefact that is there: without --overwrite it would be refused.
EXPORT_AGAIN_HINT = (
    "export the weights again: python -m ulae_rt.export --weights FILE --out DIR --overwrite"
)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph.

    Attributes:
        name: as in the graph.
        shape: every size fixed but the first, which may be :data:`ANY_BATCH`.
        dtype: numpy's name.
        units: of the values.
        components: meaning of the channels, in their order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    units: str
    components: tuple[str, ...]


@dataclass(frozen=True)
class EngineMetadata:
    """What the images must be like, and where the weights come from.

    The names are those of ``ulae_rt.model.Metadata``; engines run without the model package.

    Attributes:
        variant: ``paper`` or ``release``.
        shape: (D, H, W) of the grid the engine works on.
        spacing_mm: edge of that grid's cubic voxels.
        normalisation: how intensities are brought to [0, 1].
        training_data: what the weights were trained on; empty when unknown.
        licence: under what terms the weights may be used; empty when unknown.
    """

    variant: str
    shape: tuple[int, int, int]
    spacing_mm: float
    normalisation: str
    training_data: str
    licence: str


@dataclass(frozen=True)
class Work:
    """What one run of the graph takes, counted on its nodes for one pair.

    Attributes:
        gflop: 10^9 operations of its convolutions, 2 a multiply-add.
        gigabytes: what the nodes read and write if each did so on its own; an engine that fuses
            them moves less.
        nodes: how many there are.
    """

    gflop: float
    gigabytes: float
    nodes: int


@dataclass(frozen=True)
class Measured:
    """How far the artefact was from the reference on one pair of images.

    Attributes:
        pair: which images.
        runtime: what ran the artefact, and on which kind of device.
        machine: name of the processor or GPU.
        seconds: a run of one batch, or of one pair where any number is taken, at its quickest.
        disp_largest: length of the reference's largest displacement, voxels.
        disp_mean, disp_p99, disp_max: length of the difference of the displacements, voxels.
        moved_mean, moved_max: difference of the moved images, whose intensities lie in [0, 1].
        sign_flips: voxels whose Jacobian determinant has another sign than the reference's.
    """

    pair: str
    runtime: str
    machine: str
    seconds: float
    disp_largest: float
    disp_mean: float
    disp_p99: float
    disp_max: float
    moved_mean: float
    moved_max: float
    sign_flips: int


@dataclass(frozen=True)
class Tolerance:
    """The largest differences from the reference that pass.

    Attributes:
        disp_mean, disp_p99, disp_max: length of the displacement's difference, voxels.
        moved_mean, moved_max: difference of the moved images, intensities in [0, 1].
        sign_flips: voxels whose Jacobian determinant changes its sign, of a million.
        sign_flip_count: so many of them pass in any grid.
    """

    disp_mean: float
    disp_p99: float
    disp_max: float
    moved_mean: float
    moved_max: float
    sign_flips: float
    sign_flip_count: float

    def exceeded(self, errors: Any, voxels: int) -> list[tuple[str, float, float]]:
        """What does not pass.

        Args:
            errors: `Measured`, or anything else with its fields.
            voxels: of the grid.

        Returns:
            Name of each such field, its value in the field's unit, and what is allowed. NaN does
            not pass.
        """
        names = [name for name in TOLERANCE_NAMES if not name.startswith("sign")]
        values = [
            (name, getattr(errors, name), getattr(self, name))
            for name in names
            if not getattr(errors, name) <= getattr(self, name)
        ]
        rate = errors.sign_flips * 1e6 / voxels
        if not (rate <= self.sign_flips or errors.sign_flips <= self.sign_flip_count):
            values.append(("sign_flips", rate, self.sign_flips))
        return values

    def looser_than_standard(self, precision: str) -> list[str]:
        """The names of what it lets pass and the standard of the precision does not."""
        standard = TOLERANCES[precision]
        return [n for n in TOLERANCE_NAMES if getattr(self, n) > getattr(standard, n)]


TOLERANCE_NAMES = tuple(field.name for field in dataclasses.fields(Tolerance))

# fp32: 1e-3 voxel is what users are promised; torch's own float32 is 8.6e-4 off at 160x192x160,
# ONNX Runtime's 2.2e-4. fp16 and bf16: several times what was measured with the shipped weights on
# the sample pair and the canary (bench/NOTES.md). Noise changes by up to 1 a voxel, so that its
# moved image is off by as much as its displacement. A wrong sampler is off by 0.2 in the mean.
#
# Sign flips pass by their rate or by their count. They are chance: a determinant within the
# rounding of 0. On a grid of 32x16x16 a rate of 100 in a million allows 0.8 of a voxel, which one
# flip exceeds. Where one flip is expected, up to 4 come with a probability of 99.6 % (Poisson), so
# 4 pass on any grid: the more lenient of the two below 40,000 voxels in fp32, 4,000 in fp16.
_SIGN_FLIP_COUNT = 4.0
TOLERANCES = {
    "fp32": Tolerance(2e-4, 1e-3, 1e-3, 1e-4, 1e-3, 100.0, _SIGN_FLIP_COUNT),
    "fp16": Tolerance(5e-3, 0.02, 0.1, 2e-3, 0.05, 1000.0, _SIGN_FLIP_COUNT),
    "bf16": Tolerance(0.05, 0.15, 0.5, 0.05, 0.5, 5000.0, _SIGN_FLIP_COUNT),
}


@dataclass(frozen=True)
class Manifest:
    """What an artefact is.

    Attributes:
        artefact: its file name, beside the manifest.
        kind: one of :data:`KINDS`; what opens it follows from that.
        precision: of the features between the images and the flow heads: fp32, fp16 or bf16.
        target: where it runs: ``any``, ``cpu``, or the GPU architecture it was built for, ``sm89``.
        compatibility: other GPUs that run it too: ``none``, ``ampere-plus``, ``same-capability``.
        inputs, outputs: in the graph's order.
        metadata: what the network was made for.
        preprocessing: what to do with a scan before it is fed, step by step.
        versions: of everything that made it; what runs it must fit them.
        work: what one run takes.
        types: how many nodes of a kind compute in which type, e.g. ``convolution float16``.
        weights_sha256, artefact_sha256: of the two files, hexadecimal.
        status: :data:`VERIFIED`, or :data:`NOT_RUN` where no runtime for it was at hand.
        tolerance: that its errors were held to, or would have been.
        errors: one entry for each pair it was verified on.
        date: when it was made, ISO 8601, UTC.
    """

    artefact: str
    kind: str
    precision: str
    target: str
    compatibility: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: EngineMetadata
    preprocessing: tuple[str, ...]
    versions: dict[str, str]
    work: Work
    types: dict[str, int]
    weights_sha256: str
    artefact_sha256: str
    status: str
    tolerance: Tolerance
    errors: tuple[Measured, ...]
    date: str
    format_version: int = FORMAT_VERSION

    @property
    def batch(self) -> int:
        """Pairs a run takes, or :data:`ANY_BATCH`."""
        return self.inputs[0].shape[0]

    def to_json(self) -> str:
        """An indented JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest file.

        Raises:
            EngineMismatch: if it is missing, no manifest, or of a version this one cannot read.
        """
        place = what_is_at(path)
        if place == "not there":
            raise EngineMismatch(
                f"{path}: no such manifest",
                "an artefact runs only with the manifest its export wrote beside it; copy both",
            )
        try:
            if place != "file":
                raise ValueError("it is a folder" if place == "folder" else place)
            if (size := path.stat().st_size) > _LARGEST_FILE:
                raise ValueError(f"{size} bytes, expected some thousands")
            values = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EngineMismatch(
                f"{path}: not a manifest ({error.strerror})", EXPORT_AGAIN_HINT
            ) from error
        except ValueError as error:
            raise EngineMismatch(f"{path}: not a manifest ({error})", EXPORT_AGAIN_HINT) from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION or not isinstance(version, int):
            raise EngineMismatch(
                f"{path}: manifest format {str(version)[:40]}, expected {FORMAT_VERSION}",
                f"another version of ulae_rt wrote it; {EXPORT_AGAIN_HINT}",
            )
        try:
            manifest: Manifest = _parse(cls, values, "manifest")
            _check(manifest)
        except _UnknownChoice as error:
            raise EngineMismatch(
                f"{path}: {error}",
                "a newer version of ulae_rt wrote it; install that version, or "
                f"{EXPORT_AGAIN_HINT}",
            ) from error
        except ValueError as error:
            raise EngineMismatch(f"{path}: {error}", EXPORT_AGAIN_HINT) from error
        return manifest


def network_differences(one: Manifest, other: Manifest) -> str:
    """How two engines of different networks differ, in words; empty if they are of the same.

    Engines in one folder stand for one another, so that they must be of the same weights, grid and
    intensities.
    """
    values = [
        {"weights_sha256": manifest.weights_sha256[:12], **dataclasses.asdict(manifest.metadata)}
        for manifest in (one, other)
    ]
    for name, value in values[0].items():
        if value != values[1][name]:
            return f"{name} is {value!r} in one and {values[1][name]!r} in the other"
    return ""


def preprocessing_of(spacing_mm: float, normalisation: str) -> tuple[str, ...]:
    """What to do with a scan before an engine is fed, step by step."""
    return (
        "skull-stripped, background 0",
        "axes d, h, w to the right, to the front and to the top of the head (RAS)",
        f"resampled to cubic voxels of {spacing_mm:g} mm, the moving image through the affine "
        "transform to the fixed one",
        "cropped or padded to the shape, the fixed brain in the middle",
        f"intensities to [0, 1] by normalisation '{normalisation}'",
    )


def manifest_path(artefact: Path) -> Path:
    """Where the manifest of an artefact lies."""
    return artefact.with_suffix(".json")


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


class _UnknownChoice(ValueError):
    """A value that a later version may know."""


def _check(manifest: Manifest) -> None:
    """That every value is possible, and that none contradicts another.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value, choices in (
        ("kind", manifest.kind, KINDS),
        ("precision", manifest.precision, PRECISIONS),
        ("compatibility", manifest.compatibility, COMPATIBILITIES),
        ("status", manifest.status, (VERIFIED, NOT_RUN)),
        ("variant", manifest.metadata.variant, VARIANTS),
        ("normalisation", manifest.metadata.normalisation, NORMALISATIONS),
    ):
        if value not in choices:
            raise _UnknownChoice(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    _check_name(manifest)
    _check_target(manifest)
    _check_grid(manifest)
    for name in ("weights_sha256", "artefact_sha256"):
        if not re.fullmatch("[0-9a-f]{64}", getattr(manifest, name)):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}, expected 64 digits, 0 to f")
    work = dataclasses.asdict(manifest.work)
    for name, number in (*work.items(), *manifest.types.items()):
        if number < 0:
            raise ValueError(f"{name} is {number}, expected 0 or more")
    _check_errors(manifest)
    try:
        date = datetime.datetime.fromisoformat(manifest.date)
    except ValueError:
        date = None
    if date is None or date.tzinfo is None:
        raise ValueError(f"date is {manifest.date!r}, expected such as 2026-01-31T12:00:00+00:00")


def _check_name(manifest: Manifest) -> None:
    name, suffix = manifest.artefact, SUFFIX_OF[manifest.kind]
    if Path(name).name != name or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", name):
        raise ValueError(f"artefact is {name!r}, expected a file name without a folder")
    if Path(name).suffix != suffix:
        raise ValueError(f"artefact is {name!r}, expected one of kind {manifest.kind}, {suffix}")
    named = re.match(rf"ulae-net-({'|'.join(PRECISIONS)})\b", name)
    if named and named[1] != manifest.precision:
        raise ValueError(f"precision is {manifest.precision!r}, and artefact is {name!r}")
    if manifest.precision == "bf16" and manifest.kind != "pt2":
        raise ValueError(f"precision is 'bf16', which no artefact of kind {manifest.kind} has")


def _check_target(manifest: Manifest) -> None:
    gpu = re.fullmatch(r"sm\d{2,3}", manifest.target)
    fits, expected = {
        "onnx": (manifest.target == "any", "any"),
        "pt2": (manifest.target == "cpu" or gpu, "cpu, or a GPU such as sm89"),
    }.get(manifest.kind, (gpu, "a GPU such as sm89"))
    if not fits:
        raise ValueError(
            f"target is {manifest.target!r}, expected {expected} of kind {manifest.kind}"
        )
    if manifest.compatibility != "none" and SUFFIX_OF[manifest.kind] != ".engine":
        raise ValueError(
            f"compatibility is {manifest.compatibility!r}, expected none of kind {manifest.kind}"
        )


def _check_grid(manifest: Manifest) -> None:
    """Inputs, outputs and metadata speak of one grid and one batch."""
    shape, spacing = manifest.metadata.shape, manifest.metadata.spacing_mm
    if not all(1 <= size <= LARGEST_SIZE for size in shape):
        raise ValueError(f"shape is {list(shape)}, expected three sizes from 1 to {LARGEST_SIZE}")
    if not (1 <= spacing <= LARGEST_SIZE and spacing.is_integer()):
        raise ValueError(f"spacing_mm is {spacing:g}, expected a whole number of mm, 1 or more")
    if not manifest.inputs or not manifest.outputs:
        raise ValueError("it names no inputs or no outputs")
    specs = (*manifest.inputs, *manifest.outputs)
    batch = specs[0].shape[0] if specs[0].shape else 0
    if batch != ANY_BATCH and not 1 <= batch <= LARGEST_SIZE:
        raise ValueError(f"the batch of {specs[0].name!r} is {batch}, expected 1 or more, or -1")
    stated = [(spec.name, spec.dtype, spec.shape, spec.components) for spec in specs]
    expected = [
        (name, "float32", (batch, len(components), *shape), components)
        for name, components in TENSORS.items()
    ]
    for has, should in itertools.zip_longest(stated, expected):
        if has != should:
            raise ValueError(f"of its inputs and outputs one is {str(has)[:90]}, expected {should}")
    if len(manifest.inputs) != 2:
        raise ValueError(f"it has {len(manifest.inputs)} inputs, expected 2")
    for spec in specs:
        if spec.units != UNITS[spec.name]:
            raise ValueError(f"the units of {spec.name!r} are {spec.units[:40]!r}, expected others")
    steps = preprocessing_of(spacing, manifest.metadata.normalisation)
    if manifest.preprocessing != steps:
        raise ValueError(
            f"its preprocessing contradicts its metadata ({spacing:g} mm, normalisation "
            f"{manifest.metadata.normalisation!r})"
        )


def _check_errors(manifest: Manifest) -> None:
    """A verified artefact was run, and its errors are within its tolerance."""
    for name, number in dataclasses.asdict(manifest.tolerance).items():
        if number < 0:
            raise ValueError(f"tolerance {name} is {number:g}, expected 0 or more")
    if bool(manifest.errors) != (manifest.status == VERIFIED):
        raise ValueError(
            f"status is {manifest.status!r}, and it has {len(manifest.errors)} errors, expected "
            f"some of a {VERIFIED} artefact and none otherwise"
        )
    voxels = math.prod(manifest.metadata.shape)
    for errors in manifest.errors:
        for name in (field.name for field in dataclasses.fields(Measured)):
            value = getattr(errors, name)
            if not isinstance(value, str) and value < 0:
                raise ValueError(f"{name} is {value:g}, expected 0 or more")
        if errors.seconds == 0:
            raise ValueError("seconds is 0, expected more")
        for part, whole in (
            ("disp_mean", "disp_max"), ("disp_p99", "disp_max"), ("moved_mean", "moved_max"),
        ):  # fmt: skip
            small, large = getattr(errors, part), getattr(errors, whole)
            if small > large * (1 + 1e-6) + 1e-12:  # a mean of equal values may round up
                raise ValueError(f"{part} is {small:g}, and {whole} is {large:g}")
        if errors.sign_flips > voxels:
            raise ValueError(f"sign_flips is {errors.sign_flips}, of {voxels} voxels")
        for name, value, allowed in manifest.tolerance.exceeded(errors, voxels):
            raise ValueError(
                f"{name} is {value:.3g} on {errors.pair!r}, and its tolerance {allowed:g}"
            )


def _parse(kind: Any, value: Any, name: str) -> Any:
    """``value`` as a ``kind``: one of this module's dataclasses, or a type of their fields.

    Raises:
        ValueError: naming the first part that does not fit.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {_name(value)}, expected an object")
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        if missing := sorted(fields.keys() - value.keys()):
            raise ValueError(f"{name} has no '{missing[0]}'")
        if unknown := sorted(value.keys() - fields.keys()):
            raise ValueError(f"{name} has an unknown '{unknown[0]}'")
        parts = {key: _parse(fields[key], value[key], key) for key in fields}
        return kind(**parts)  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, list) or size not in (None, len(value)):
            raise ValueError(f"{name} is {_name(value)}, expected {size or 'a list of'} values")
        return tuple(_parse(arguments[0], item, name) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {_name(value)}, expected an object")
        return {
            _parse(str, key, f"a name in {name}"): _parse(arguments[1], item, f"{name}.{key}")
            for key, item in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**53:
            raise ValueError(f"{name} is {_name(value)}, expected a smaller number")
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {_name(value)}, expected {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is JSON and can be neither printed nor written
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{name} is {_name(value)}, expected a smaller number")
    return value


def _name(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
