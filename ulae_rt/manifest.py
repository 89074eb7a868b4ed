"""The sidecar of an engine: written by the exporter, checked by the runtime before it opens one.

One JSON file beside each artefact, ``<artefact stem>.json``. It says everything that is needed to
feed the artefact and to refuse one that is not what was verified.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from ulae_rt.errors import EngineMismatch

FORMAT_VERSION = 2
KINDS = ("onnx", "tensorrt", "tensorrt-rtx", "pt2")
VERIFIED = "verified"
NOT_RUN = "built, not run"
ANY_BATCH = -1  # in a shape: the artefact takes any number of pairs at once
_AGAIN = "export the weights again: python -m ulae_rt.export --weights FILE"


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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EngineMismatch(
                f"{path}: no such manifest",
                "an artefact runs only with the manifest its export wrote beside it; copy both",
            ) from error
        except (OSError, ValueError) as error:
            raise EngineMismatch(f"{path}: not a manifest ({error})", _AGAIN) from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise EngineMismatch(
                f"{path}: manifest format {version!r}, expected {FORMAT_VERSION}",
                f"another version of ulae_rt wrote it; {_AGAIN}",
            )
        try:
            manifest: Manifest = _parse(cls, values, "manifest")
        except ValueError as error:
            raise EngineMismatch(f"{path}: {error}", _AGAIN) from error
        if manifest.artefact != Path(manifest.artefact).name or not manifest.artefact:
            raise EngineMismatch(
                f"{path}: artefact is {manifest.artefact!r}, expected a file name without a folder",
                _AGAIN,
            )
        for name, value, known in (
            ("kind", manifest.kind, KINDS),
            ("status", manifest.status, (VERIFIED, NOT_RUN)),
        ):
            if value not in known:
                raise EngineMismatch(
                    f"{path}: {name} is {value!r}, expected one of {', '.join(known)}",
                    f"a newer version of ulae_rt wrote it; install that version, or {_AGAIN}",
                )
        if not all(len(spec.shape) == 5 for spec in (*manifest.inputs, *manifest.outputs)):
            raise EngineMismatch(f"{path}: a shape has not five axes (B, C, D, H, W)", _AGAIN)
        if not manifest.inputs or not manifest.outputs:
            raise EngineMismatch(f"{path}: names no inputs or no outputs", _AGAIN)
        return manifest


def manifest_path(artefact: Path) -> Path:
    """Where the manifest of an artefact lies."""
    return artefact.with_suffix(".json")


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


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
        return {key: _parse(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {_name(value)}, expected {kind.__name__}")
    return value


def _name(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
