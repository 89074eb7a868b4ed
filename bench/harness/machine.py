"""What the figures were measured on, and what this machine can do at most."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from harness.gpu_timing import copy_bandwidth, seconds_of

PACKAGES = (
    "torch", "triton", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx", "nibabel", "SimpleITK", "antspyx", "picsl-greedy", "fused-lncc", "fireants",
    "monai", "voxelmorph", "pytest-benchmark",
)  # fmt: skip
# nvidia-smi's name of each, and ours.
_SMI = {
    "driver_version": "driver",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.max.memory": "memory_max_mhz",
    "clocks.sm": "sm_mhz",
    "power.limit": "power_limit_w",
}
# Of the matrices that the matrix rate is taken from; a multiple of every tile.
_SIDE = {"cuda": 8192, "cpu": 2048}
_ROUNDS = 10


def facts() -> dict[str, Any]:
    """Processor and GPU, with the names that files and people know the machine by."""
    processor, cores = _processor(), len(os.sched_getaffinity(0))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "name": _slug(gpu) if gpu else f"cpu{cores}-{_slug(processor)}",
        "title": gpu or f"{processor}, {cores} cores",
        "processor": processor,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "gpu": gpu,
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "system": platform.platform(),
        **(_clocks() if gpu else {}),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):  # other systems, other processors
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return platform.processor() or platform.machine()


def _slug(name: str) -> str:
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _clocks() -> dict[str, str]:
    """Driver, clocks and power limit, as ``nvidia-smi`` says them; nothing where it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    done = subprocess.run(
        [tool, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(_SMI):
        return {}
    return dict(zip(_SMI.values(), values, strict=True))


def versions() -> dict[str, str | None]:
    """Of the packages that a figure depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def ceilings(device: torch.device) -> tuple[float, dict[str, float]]:
    """Bytes a second of a large copy, and FLOP/s of large matrices by precision."""
    return copy_bandwidth(device), {
        name: _matmul(device, dtype)
        for name, dtype in (
            ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)
        )
        if name != "fp16" or device.type == "cuda"  # no CPU has fast fp16
    }  # fmt: skip


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE[device.type]
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        seconds = [seconds_of(lambda: a @ b, device) for _ in range(_ROUNDS)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * side**3 / min(seconds)  # a ceiling that is beaten is none
