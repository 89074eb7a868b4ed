"""Reading and writing weights: the project's own files and the released code's ``.pth``."""

import logging
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ulae_rt.errors import BackendUnavailable, CheckpointError, UsageError
from ulae_rt.model.metadata import Metadata
from ulae_rt.model.ulae_net import STEPS, UlaeNet
from ulae_rt.optional import require

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "ulae-oasis-labels.safetensors"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

METADATA_KEY = "ulae_rt"
MODEL_KEY = "model"
_SUFFIXES = (".safetensors", ".pt", ".pth")
_RELEASED_KEY = re.compile(r"acc([123])\.(\w+)\.(.+)")


def load_model(
    path: str | os.PathLike[str] | None = None, *, device: str = "cpu", precision: str = "fp32"
) -> UlaeNet:
    """Read weights into a network in eval mode.

    Args:
        path: ``.safetensors`` or ``.pt`` written by this project, or the released code's ``.pth``
            state dict (bare, or under ``state_dict`` or ``model``). None: the shipped weights.
        device: where to put it, for example ``cpu`` or ``cuda:1``.
        precision: type of the features, ``fp32``, ``bf16`` or ``fp16``; displacements and warps
            stay in float32.

    Returns:
        The network; its ``metadata`` says what the weights were made for.

    Raises:
        CheckpointError: for a file that is missing, damaged, of another network, or a pickle that
            would run code.
        BackendUnavailable: for a device or precision this machine does not have.
    """
    path = DEFAULT_WEIGHTS if path is None else Path(path)
    state, metadata = _read(path)
    model = UlaeNet(metadata.variant, metadata.channels, metadata.accumulate, metadata.uncoupled)
    _fill(model, state, path)
    model.metadata = metadata
    model.feature_dtype = _feature_dtype(precision, device)
    return model.to(device).eval()


def save_checkpoint(path: str | os.PathLike[str], model: UlaeNet, metadata: Metadata) -> None:
    """Write ``model`` as safetensors, whole or not at all."""
    path = Path(path)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        content = require("safetensors.torch", "torch").save(
            tensors, {METADATA_KEY: metadata.to_json()}
        )
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_torch(path: Path) -> Any:
    """What a torch file holds, never running code that it carries."""
    try:
        with warnings.catch_warnings():
            # About pickles that torch did not write; they are refused below in our own words.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # a web page, a Git LFS pointer: no pickle at all
            raise _damaged(path, ValueError("not a torch file")) from error
        if "eights only" not in str(error):  # torch's words for a refusal, not for damage
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path}: refused, because reading it could run code that it carries",
            "save a plain state dict of tensors: torch.save(model.state_dict(), path)",
        ) from error
    except Exception as error:  # bytes that are no pickle fail in every way: IndexError, KeyError
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"{path}: damaged or not a weights file ({reason[:120]})", "copy or download it again"
    )


def _read(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such weights file",
            "the installation lacks its weights: install it again"
            if path == DEFAULT_WEIGHTS
            else "check the path given to --weights",
        )
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(
            f"{path}: weights end in {', '.join(_SUFFIXES)}, got '{path.suffix}'",
            "give the file that training or export wrote",
        )
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it", "check the file's permissions")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get(METADATA_KEY), str):
        metadata = Metadata.from_json(content[METADATA_KEY], str(path))
        return _state_dict(content, path), metadata
    return _from_released(_state_dict(content, path), path)


def _read_safetensors(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    safetensors = require("safetensors", "torch")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if text is None:
        raise CheckpointError(
            f"{path}: holds no '{METADATA_KEY}' metadata",
            "expected a file that `ulae-rt train` wrote",
        )
    return state, Metadata.from_json(text, str(path))


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    for key in ("state_dict", MODEL_KEY):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got {type(content).__name__}",
            "save a plain state dict: torch.save(model.state_dict(), path)",
        )
    return content


def _from_released(
    state: Mapping[str, Tensor], path: Path
) -> tuple[Mapping[str, Tensor], Metadata]:
    """The released code's names, brought to this project's.

    There ``acc{1,2,3}`` each hold the encoder (the same values three times), decoder blocks of
    their own and a head named ``output``; ``*.grid`` buffers are of one size and are dropped.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        key = key.removeprefix("module.")  # DataParallel's
        if key == "grid" or key.endswith(".grid"):
            continue
        match = _RELEASED_KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        step, block, rest = match.groups()
        if block == "output":
            name = f"heads.{step}.{rest}"
        elif block.startswith("dc"):
            name = f"decoders.{step}.{block}.{rest}"
        else:
            name = f"encoder.{block}.{rest}"
        if name in renamed and not torch.equal(renamed[name], value):
            raise CheckpointError(
                f"{path}: {key} differs from the same layer of an earlier step",
                "the steps of ULAE-net share one encoder; this is not its checkpoint",
            )
        renamed[name] = value
    if unknown or not renamed:
        what = f"unknown key '{unknown[0]}'" if unknown else "no layer of ULAE-net"
        raise CheckpointError(
            f"{path}: {what}, expected keys acc1.*, acc2.*, acc3.*",
            "give a checkpoint of this project or of the released ULAE-net code",
        )
    first = renamed.get("encoder.fec1.0.weight")
    channels = first.shape[0] if first is not None and first.ndim == 5 else 16
    return renamed, Metadata(variant="release", channels=channels)


def _fill(model: UlaeNet, state: Mapping[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    hint = f"this network is '{model.variant}' with {model.channels} channels and {STEPS} steps"
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} missing key(s), first '{missing[0]}'", hint)
    if extra:
        raise CheckpointError(f"{path}: {len(extra)} unknown key(s), first '{extra[0]}'", hint)
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}",
                hint,
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{path}: {key} holds NaN or Inf", "the training had diverged")
    model.load_state_dict(dict(state))


def _feature_dtype(precision: str, device: str) -> torch.dtype | None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device is {device!r}, expected cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            f"device {device} was asked for, and torch sees no CUDA device",
            "use --device cpu, or run `ulae-rt doctor` to see why",
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device {device} was asked for, and torch sees {torch.cuda.device_count()} of them",
            "count from cuda:0; `ulae-rt doctor` lists them",
        )
    if kind == "cpu" and precision == "fp16":
        raise BackendUnavailable(
            "precision fp16 was asked for on the CPU, which has no fast fp16 convolution",
            "use --precision bf16 or fp32",
        )
    if kind == "cpu" and precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise BackendUnavailable(
            "precision bf16 was asked for, and this processor has no AVX-512 to run it",
            "use --precision fp32",
        )
    return PRECISIONS[precision]
