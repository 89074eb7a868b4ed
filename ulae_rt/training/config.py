"""A training run as one TOML file, checked before any work."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ulae_rt.errors import ConfigError
from ulae_rt.strict_csv import decode_text

# What is relative to the file, or on the command line to the working directory.
_PATHS = (("data", "train"), ("data", "val"), ("output", "folder"), ("optimiser", "start"))

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take ``steps = true`` for one step."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("expected no boolean")
        return value


class DataConfig(_Section):
    """Where the scans are.

    Attributes:
        train: folder of prepared scans (``ID.nii.gz``), or a text file with one path a line.
        val: the same for validation, with ``ID_labels.nii.gz`` beside each scan; none: no Dice.
        val_pairs: how many ordered pairs of it are looked at.
        pool: edge of the blocks that are averaged; 2 trains 1 mm scans at 2 mm.
        workers: threads that read scans ahead, in each training process; 0: each step reads its
            own; ``auto``: 0 on a CPU, up to 8 for a GPU.
        description, licence: written into every checkpoint.
    """

    train: Path
    val: Path | None = None
    val_pairs: Annotated[int, Field(ge=1)] = 5
    pool: Literal[1, 2, 4] = 1
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    description: str = ""
    licence: str = ""


class ModelConfig(_Section):
    """Arguments of :class:`ulae_rt.model.UlaeNet`."""

    variant: Literal["paper", "release"] = "paper"
    channels: Annotated[int, Field(ge=1)] = 16
    accumulate: bool = True
    uncoupled: bool = True


class LossConfig(_Section):
    """Arguments of :func:`ulae_rt.losses.registration_loss`.

    Attributes:
        labels: weight of the labels' overlap; above 0 each training scan needs ``ID_labels.nii.gz``
            beside it.
        progressive: compare the fixed image with M_3 (three interpolations, as the released code
            trains) in place of W.
    """

    windows: tuple[int, ...] = (11, 9, 7)
    gamma: Positive = 0.5
    smoothness: NonNegative = 1.0
    folding: NonNegative = 0.0
    labels: NonNegative = 0.0
    progressive: bool = False

    @field_validator("windows")
    @classmethod
    def _odd(cls, windows: tuple[int, ...]) -> tuple[int, ...]:
        if not windows or any(w < 1 or w % 2 == 0 for w in windows):
            raise ValueError("expected one or more positive odd integers")
        return windows


class AugmentConfig(_Section):
    """Random changes of a pair; all zero is the paper's protocol.

    Attributes:
        flip: probability of mirroring the pair left to right.
        rotation_deg, shift_mm: largest common rotation about each axis and shift of both images.
        scale: smallest and largest common size of each axis relative to the prepared scan's.
        residual_deg, residual_scale, residual_mm: the same for the moving image alone, about 1 in
            the case of the scale: an imperfect affine.
        intensity: largest relative change of gain and gamma, of each image on its own.
        bias: largest relative change by a smooth field, of each image on its own.
        deform_mm: largest shift of a knot of a smooth random deformation, of the moving image
            alone. Knots are 32 mm apart, so that 5 mm cannot fold.
    """

    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    rotation_deg: NonNegative = 0.0
    shift_mm: NonNegative = 0.0
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    residual_deg: NonNegative = 0.0
    residual_scale: Fraction = 0.0
    residual_mm: NonNegative = 0.0
    intensity: Fraction = 0.0
    bias: Fraction = 0.0
    deform_mm: Annotated[float, Field(ge=0, le=5)] = 0.0

    @field_validator("scale")
    @classmethod
    def _in_order(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError("expected the smaller one first")
        return scale


class OptimiserConfig(_Section):
    """Adam.

    Attributes:
        steps: updates of the weights.
        batch: pairs in each of them, over all processes; the gradient is the mean over the pairs.
        lr: learning rate; lr_final: where a half cosine brings it by the last step; none: constant.
        warmup: first steps over which it rises linearly from 0.
        precision: type of the features.
        start: weights to begin with; none: random ones. A run that resumes has its own.
    """

    steps: Annotated[int, Field(ge=1)] = 160_000
    batch: Annotated[int, Field(ge=1)] = 1
    lr: Positive = 1e-4
    lr_final: Positive | None = None
    warmup: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    start: Path | None = None
    seed: int = 0


class RunConfig(_Section):
    """How a run uses the machine.

    What is learned does not depend on it, rounding apart: all of it may change on ``--resume``, as
    may the number of processes.

    Attributes:
        device: ``auto`` (the first GPU, or the CPU where there is none), ``cpu``, ``cuda`` or
            ``cuda:N``. Under torchrun each process takes the GPU of its own local rank.
        micro_batch: pairs that go through the network at once. ``optimiser.batch`` is shared out
            evenly over the processes, and each adds up the gradients of its micro-batches.
        compile: run the network through torch.compile; needs a C++ compiler on a CPU.
        cuda_graph: record a micro-batch's kernels once and replay them, which saves the time of
            launching them one by one; CUDA only.
        activation_checkpointing: compute features again in the backward pass in place of keeping
            them. ``auto``: from when a GPU's memory does not suffice; ``on``; ``off``.
        minutes: after which the run stops with a checkpoint that ``--resume`` goes on from exactly;
            none: at the last step. For machines that one has for a time.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    micro_batch: Annotated[int, Field(ge=1)] = 1
    compile: bool = False
    cuda_graph: bool = False
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    minutes: Positive | None = None


class OutputConfig(_Section):
    """What is written, and how often in steps."""

    folder: Path
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    validate_every: Annotated[int, Field(ge=1)] = 1000


class TrainConfig(_Section):
    """A whole run; :func:`read_config` reads it."""

    data: DataConfig
    output: OutputConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    run: RunConfig = RunConfig()


def _without_effect(config: TrainConfig) -> str:
    """What was set and would do nothing, in words; nothing where there is none."""
    if config.data.val is None:
        for name, section, key in (
            ("data", config.data, "val_pairs"), ("output", config.output, "validate_every"),
        ):  # fmt: skip
            if key in section.model_fields_set:
                return f"{name}.{key} has no effect without data.val"
    settings = config.optimiser
    if settings.lr_final is not None and settings.lr_final > settings.lr:
        return "optimiser.lr_final is above optimiser.lr"
    if config.run.cuda_graph and config.run.device == "cpu":
        return "run.cuda_graph has no effect on the CPU"
    return ""


def read_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read and check a configuration.

    Args:
        path: a TOML file; paths in it are relative to its folder.
        changes: ``SECTION.KEY=VALUE`` each, VALUE as in TOML, where text needs no quotes; paths are
            relative to the working directory.

    Raises:
        ConfigError: for a missing file, bad TOML, or an unknown or wrong entry, named.
    """
    try:
        values = tomllib.loads(decode_text(path.read_bytes()))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror})", "give the path of a TOML file"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: not valid TOML ({error})", "see configs/ for examples"
        ) from error
    except RecursionError:
        raise ConfigError(
            f"{path}: not valid TOML (nested too deep)", "see configs/ for examples"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}", "save it as UTF-8") from None
    base = path.resolve().parent
    for section, key in _PATHS:
        if isinstance(values.get(section), dict) and isinstance(values[section].get(key), str):
            values[section][key] = base / values[section][key]
    for change in changes:
        section, key, value = _parsed(change)
        if (section, key) in _PATHS and isinstance(value, str):
            value = Path.cwd() / value
        part = values.setdefault(section, {})
        if isinstance(part, dict):  # anything else is named below
            part[key] = value
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {where}: {first['msg']}, got {first.get('input')!r}", "see configs/"
        ) from error
    if problem := _without_effect(config):
        raise ConfigError(f"{path}: {problem}", "leave it out, or set the two to fit")
    return config


def _parsed(change: str) -> tuple[str, str, Any]:
    """Section, key and value of ``SECTION.KEY=VALUE``."""
    name, equals, text = change.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(
            f"--set {change}: expected SECTION.KEY=VALUE", "for example --set optimiser.steps=500"
        )
    try:
        return section, key, tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return section, key, text.strip()
