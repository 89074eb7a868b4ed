"""Reading and writing weights: the project's own files and the released code's ``.pth``."""

import contextlib
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

from ulae_rt.arguments import check_choice, device_name, parse_device, path_of, what_is_at
from ulae_rt.errors import BackendUnavailable, CheckpointError, OutputError, UsageError
from ulae_rt.manifest import SUFFIX_OF
from ulae_rt.model.metadata import Metadata
from ulae_rt.model.ulae_net import STEPS, UlaeNet
from ulae_rt.optional import require

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "ulae-oasis-labels.safetensors"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

METADATA_KEY = "ulae_rt"
MODEL_KEY = "model"
# Of files of weights, in any case; what is in a file decides how it is read.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
_RELEASED_KEY = re.compile(r"acc([123])\.(\w+)\.(.+)")
_OWN_KEY = re.compile(r"(encoder|decoders|heads)\..+")
# What DataParallel, torch.compile and Lightning put before the names of what they hold.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
# Where a training code keeps the tensors among other things.
_CONTAINERS = ("state_dict", MODEL_KEY, "model_state_dict", "net")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

SAVE_HINT = (
    "of the released code's network give what torch.save(model.state_dict(), path) writes, of this "
    "project's what ulae_rt.model.save_checkpoint(path, model, metadata) writes"
)


def load_model(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> UlaeNet:
    """Read weights into a network in eval mode.

    Args:
        path: ``.safetensors`` or ``.pt`` written by this project, or the released code's ``.pth``
            state dict (bare, or under ``state_dict`` or ``model``), whatever the suffix says.
            Prefixes of DataParallel, torch.compile and Lightning that all names share are dropped.
            None: the shipped weights.
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
    path = DEFAULT_WEIGHTS if path is None else path_of(path)
    device = device_name(device, "cpu, cuda or cuda:N")
    feature_dtype = _feature_dtype(precision, device)
    state, metadata = _read(path)
    arguments = (metadata.variant, metadata.channels, metadata.accumulate, metadata.uncoupled)
    with torch.device("meta"):  # takes no memory, whatever the file says of its size
        expected = UlaeNet(*arguments)
    state = _checked(expected, state, path)
    model = UlaeNet(*arguments)
    model.load_state_dict(state)
    model.metadata = metadata
    model.feature_dtype = feature_dtype
    return model.to(device).eval()


def save_checkpoint(path: str | os.PathLike[str], model: UlaeNet, metadata: Metadata) -> None:
    """Write ``model`` as safetensors, whole or not at all.

    Raises:
        UsageError: for metadata that no file can have, or of another network than ``model``.
        OutputError: if the file cannot be written.
    """
    path = path_of(path)
    try:
        text = metadata.to_json()
        Metadata.from_json(text, "metadata")
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"metadata cannot be saved: {error}", "give an ulae_rt.model.Metadata of the network"
        ) from error
    for name in ("variant", "channels", "accumulate", "uncoupled"):
        if getattr(model, name) != getattr(metadata, name):
            raise UsageError(
                f"metadata has {name} {getattr(metadata, name)!r}, and the model "
                f"{getattr(model, name)!r}",
                "give the metadata of this model",
            )
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        content = require("safetensors.torch", "torch").save(tensors, {METADATA_KEY: text})
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror})", "check the folder, and free some space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_torch(path: Path) -> Any:
    """What a torch file holds, never running code that it carries."""
    try:
        # A file and not its path: torch reads whatever ends in .safetensors as that.
        with path.open("rb") as file, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            content = torch.load(file, map_location="cpu", weights_only=True)
        for warning in caught:
            if "Detected pickle protocol" in str(warning.message):
                continue  # of pickles that torch did not write; refused in our own words
            logger.warning("%s: %s", path, " ".join(str(warning.message).split()))
        return content
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # a web page, a Git LFS pointer: no pickle at all
            raise _damaged(path, ValueError("not a torch file")) from error
        if "eights only" not in str(error):  # torch's words for a refusal, not for damage
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path}: refused, because reading it could run code that it carries",
            f"save the tensors alone: {SAVE_HINT}",
        ) from error
    except Exception as error:  # bytes that are no pickle fail in every way: IndexError, KeyError
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"{path}: damaged or not a weights file ({reason[:120]})", "copy or download it again"
    )


def _read(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    place = what_is_at(path)
    if place == "not there":
        raise CheckpointError(
            f"{path}: no such weights file",
            "the installation lacks its weights: install it again"
            if path == DEFAULT_WEIGHTS
            else "check the path",
        )
    if place != "file":
        reason = "a folder, expected a file of weights" if place == "folder" else place
        raise CheckpointError(f"{path}: {reason}", "give the file that training wrote")
    if path.suffix.lower() in SUFFIX_OF.values():
        raise CheckpointError(
            f"{path}: weights end in {', '.join(_SUFFIXES)}, got '{path.suffix}', which is an "
            "engine",
            "open it with load_engine, or --engine",
        )
    if path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(
            f"{path}: weights end in {', '.join(_SUFFIXES)}, got '{path.suffix}'",
            "give the file that training wrote",
        )
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it", "check the file's permissions")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise _damaged(path, OSError(error.strerror)) from error
    # Whatever the suffix: safetensors begin with the length of a JSON object, torch files as a zip
    # archive or a pickle.
    if start[8:] == b"{":
        return _read_safetensors(path)
    if path.suffix.lower() == ".safetensors" and not start.startswith((b"PK", b"\x80")):
        return _read_safetensors(path)
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get(METADATA_KEY), str):
        metadata = Metadata.from_json(content[METADATA_KEY], str(path))
        rest = {key: value for key, value in content.items() if key != METADATA_KEY}
        return _unwrapped(_state_dict(rest, path)), metadata
    return _from_released(_unwrapped(_state_dict(content, path)), path)


def _read_safetensors(path: Path) -> tuple[Mapping[str, Tensor], Metadata]:
    safetensors = require("safetensors", "torch")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # its own, and KeyError or TypeError for types torch does not have
        raise _damaged(path, error) from error
    state = _unwrapped(tensors)
    if text is not None:
        return state, Metadata.from_json(text, str(path))
    if any(_RELEASED_KEY.fullmatch(key) for key in state):
        return _from_released(state, path)
    if _is_bare(state):
        raise _bare(path)
    raise CheckpointError(
        f"{path}: holds no '{METADATA_KEY}' metadata",
        "give a file that `ulae-rt train` or ulae_rt.model.save_checkpoint wrote",
    )


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name, from where a training code keeps them."""
    if isinstance(content, dict):
        there = [key for key in _CONTAINERS if isinstance(content.get(key), dict)]
        if len(there) > 1:
            raise CheckpointError(
                f"{path}: holds several state dicts, {' and '.join(map(repr, there))}", SAVE_HINT
            )
        if there:
            content = content[there[0]]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got {type(content).__name__}", SAVE_HINT
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{type(value).__name__} {str(value)[:40]!r}"
            raise CheckpointError(
                f"{path}: entry {key!r} is {what}, expected a name and a tensor", SAVE_HINT
            )
    return content


def _unwrapped(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the prefixes of wrappers, as long as all names share them."""
    while wrapper := next(
        (w for w in _WRAPPERS if state and all(key.startswith(w) for key in state)), ""
    ):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _is_bare(state: Mapping[str, Tensor]) -> bool:
    return bool(state) and all(_OWN_KEY.fullmatch(key) for key in state)


def _bare(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: a bare state dict of this project's network, which lacks the grid, the spacing "
        "and the normalisation that the weights were made for",
        "write it with ulae_rt.model.save_checkpoint(path, model, metadata)",
    )


def _from_released(
    state: Mapping[str, Tensor], path: Path
) -> tuple[Mapping[str, Tensor], Metadata]:
    """The released code's names, brought to this project's.

    There ``acc{1,2,3}`` each hold the encoder (the same values three times), decoder blocks of
    their own and a head named ``output``; ``*.grid`` buffers are of one size and are dropped.
    """
    if _is_bare(state):
        raise _bare(path)
    state = {k: v for k, v in state.items() if k != "grid" and not k.endswith(".grid")}
    state = _unwrapped(state)
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        match = _RELEASED_KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        _check_tensor(key, value, path)
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
            f"{path}: {what}, expected keys acc1.*, acc2.*, acc3.*{_mixed_prefix(state)}",
            "give a checkpoint of this project or of the released ULAE-net code",
        )
    first = renamed.get("encoder.fec1.0.weight")
    channels = first.shape[0] if first is not None and first.ndim == 5 else 16
    if channels < 1:
        raise CheckpointError(f"{path}: its first layer has no channels", SAVE_HINT)
    return renamed, Metadata(variant="release", channels=channels)


def _mixed_prefix(state: Mapping[str, Tensor]) -> str:
    """Words about a wrapper's prefix that some names have and others have not."""
    for wrapper in _WRAPPERS:
        count = sum(key.startswith(wrapper) for key in state)
        if 0 < count < len(state):
            return f"; {count} of its {len(state)} keys have the prefix '{wrapper}', not all"
    return ""


def _check_tensor(key: str, value: Tensor, path: Path) -> None:
    """Refuse what is not real floating-point numbers, one after another."""
    what = ""
    if value.is_quantized:
        what = f"quantised ({value.dtype})"
    elif value.is_nested or value.layout != torch.strided:
        kind = str(value.layout).removeprefix("torch.")
        what = "nested" if value.is_nested else f"sparse ({kind})"
    elif value.is_meta:
        what = "on the meta device, without values"
    elif value.dtype not in _FLOATS:
        what = f"of type {str(value.dtype).removeprefix('torch.')}"
    if what:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise CheckpointError(
            f"{path}: {key} is {what}, expected a dense tensor of {names}",
            "save the weights as they were trained, model.float().state_dict()",
        )


def _checked(model: UlaeNet, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of ``model``, which has none of its own, in float32."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    hint = f"this network is '{model.variant}' with {model.channels} channels and {STEPS} steps"
    prefix = _mixed_prefix(state)
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} missing key(s), first '{missing[0]}'{prefix}", hint
        )
    if extra:
        raise CheckpointError(
            f"{path}: {len(extra)} unknown key(s), first '{extra[0]}'{prefix}", hint
        )
    checked = {}
    for key, value in expected.items():
        _check_tensor(key, state[key], path)
        if state[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}",
                hint,
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{path}: {key} holds NaN or Inf", "the training had diverged")
        checked[key] = state[key].float()
        if not torch.isfinite(checked[key]).all():
            raise CheckpointError(
                f"{path}: {key} holds values beyond {torch.finfo(torch.float32).max:.3g}, the "
                "largest of float32",
                "the training had diverged",
            )
    return checked


def _feature_dtype(precision: str, device: str) -> torch.dtype | None:
    check_choice("precision", precision, PRECISIONS)
    try:
        kind, _ = parse_device(device)
    except UsageError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise UsageError(
            f"device is {device!r}, expected cpu, cuda or cuda:N", "name it: device='cpu'"
        )
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
