"""What this machine is, and whether an artefact was made for it. Nothing here starts a GPU."""

import ctypes
import functools
import importlib
import importlib.metadata
import platform
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ulae_rt.arguments import parse_device
from ulae_rt.errors import BackendUnavailable, EngineMismatch
from ulae_rt.manifest import EXPORT_AGAIN_HINT, Manifest
from ulae_rt.optional import require

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # of a processor that multiplies it
# Kinds whose file opens with no other version than the one that made it.
TENSORRT_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

CUDA_PROVIDER = "CUDAExecutionProvider"  # ONNX Runtime's word for CUDA

_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class Gpu(NamedTuple):
    """One GPU: the driver's name for it, and its architecture (90 for compute capability 9.0)."""

    name: str
    sm: int


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs in CUDA's order, those that ``CUDA_VISIBLE_DEVICES`` leaves.

    By the driver's own library, which is wherever a GPU can be used, and without a context:
    asking costs no memory on the GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), index)
        capability = []
        for attribute in _CAPABILITY:
            value = ctypes.c_int()
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
            capability.append(value.value)
        found.append(Gpu(name.value.decode(), 10 * capability[0] + capability[1]))
    return tuple(found)


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """The processor's name, and the instruction sets it says it has."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags") or fields.get("Features") or ""  # x86's word, and Arm's
    return name, frozenset(flags.split())


def onnxruntime() -> ModuleType:
    """The library.

    Raises:
        BackendUnavailable: if it cannot be imported.
    """
    try:
        return importlib.import_module("onnxruntime")
    except Exception as error:  # a broken library fails in any way it likes
        raise BackendUnavailable(
            f"onnxruntime cannot be imported: {error}",
            "pip install onnxruntime (or onnxruntime-gpu in its place)",
        ) from error


def machine_name(device: str) -> str:
    """The name under which a measurement on ``cpu`` or ``cuda:N`` is kept in a manifest."""
    kind, index = parse_device(device)
    return gpus()[index].name if kind == "cuda" else processor()[0]


def devices_for(manifest: Manifest) -> tuple[str, ...]:
    """Where ``auto`` would run an artefact, the faster first."""
    if manifest.kind == "onnx":
        return ("cuda:0", "cpu") if gpus() and CUDA_PROVIDER in _providers() else ("cpu",)
    if manifest.kind == "pt2" and manifest.target in ("cpu", "any"):
        return ("cpu",)
    return ("cuda:0",)


def check(manifest: Manifest, device: str) -> None:
    """Whether an artefact was made for this machine; by its manifest alone.

    Args:
        manifest: of the artefact.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        BackendUnavailable: if there is no such device, it is none of those the artefact was made
            for, or the library is not installed.
        EngineMismatch: if another version of the library made the artefact, and it matters.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        if manifest.target not in ("any", "cpu") or manifest.kind in TENSORRT_MODULES:
            raise BackendUnavailable(
                f"{manifest.artefact}: is for GPUs ({manifest.target}), and the device is the CPU",
                "take another engine of the folder, or --device cuda on a machine with such a GPU",
            )
    else:
        _check_gpu(manifest, index)
    _check_library(manifest)


def _check_gpu(manifest: Manifest, index: int) -> None:
    if index >= len(gpus()):
        there = f"only {len(gpus())}" if gpus() else "none"
        raise BackendUnavailable(
            f"{manifest.artefact}: needs GPU {index}, and this machine has {there}",
            "use an engine for the CPU (ONNX, or .pt2 for cpu); `ulae-rt doctor` lists the GPUs",
        )
    gpu = gpus()[index]
    if manifest.target == "any":
        return
    match = re.fullmatch(r"sm(\d+)", manifest.target)
    if match and manifest.compatibility == "ampere-plus":
        fits, wanted = gpu.sm >= 80, "sm80 or later"
    else:
        fits, wanted = bool(match) and gpu.sm == int(match[1] if match else 0), manifest.target
    if not fits:
        raise BackendUnavailable(
            f"{manifest.artefact}: was built for {wanted}, and {gpu.name} is sm{gpu.sm}",
            f"export for this GPU: --target sm{gpu.sm}",
        )


def _check_library(manifest: Manifest) -> None:
    if manifest.kind == "onnx":
        onnxruntime()
        return
    if manifest.kind == "pt2":
        package = module = "torch"
        found = _torch_version()
    else:
        package, module = manifest.kind, TENSORRT_MODULES[manifest.kind]
        found = str(getattr(require(module, package), "__version__", "unknown"))
    made = manifest.versions.get(module, "unknown")
    # torch reads what its own minor version wrote; a plan opens with the very build alone.
    parts = 2 if manifest.kind == "pt2" else None
    if made.split(".")[:parts] != found.split(".")[:parts]:
        hint = EXPORT_AGAIN_HINT
        if made != "unknown":
            # Without +cpu or +cu130, which only torch's own index knows.
            version = made.partition("+")[0]
            hint = f"install the one that built it (pip install {package}=={version}), or {hint}"
        raise EngineMismatch(
            f"{manifest.artefact}: was built with {module} {made}, and {module} {found} is "
            "installed",
            hint,
        )


def _torch_version() -> str:
    # Not by importing it: that takes seconds, and another engine may be the one to run.
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendUnavailable(
            "torch is not installed", "pip install 'ulae-rt[torch]'"
        ) from error


def _providers() -> list[str]:
    try:
        providers: list[str] = onnxruntime().get_available_providers()
    except BackendUnavailable:
        return []
    return providers
