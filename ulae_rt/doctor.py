"""Say what can run on this machine and, for what cannot, why and what to install."""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ulae_rt
from ulae_rt import env
from ulae_rt.engines import Candidate, machine, survey
from ulae_rt.engines.folder import loosened
from ulae_rt.errors import UlaeError

if TYPE_CHECKING:
    from ulae_rt.cli import Report

GIB = 2**30
NEEDED_MEMORY = 3 * GIB  # what one registration at 1 mm may take

METADATA_KEY = "ulae_rt"  # as ulae_rt.model.checkpoint writes it; importing that takes torch


@dataclass(frozen=True)
class Check:
    """One row: can it be used here, what was found, and what to do when it cannot."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt doctor``."""
    parser.add_argument(
        "--engine", type=Path, metavar="DIR",
        help="also say which engine of an exported folder would run here, and why not the others",
    )  # fmt: skip


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Print the tables; nothing that is missing or broken makes this fail."""
    checks = {"this machine": _machine(), "what can run": _capabilities()}
    if arguments.engine is not None:
        checks["engines"] = _engines(arguments.engine)
    for title, rows in checks.items():
        report(title)
        width = max(len(row.name) for row in rows)
        for row in rows:
            report(f"  {'ok' if row.ok else 'no'}  {row.name:<{width}}  {row.detail}")
            if row.hint:
                report(f"      {'':<{width}}  -> {row.hint}")
        report()
    return {
        title.replace(" ", "_"): [asdict(row) for row in rows] for title, rows in checks.items()
    }


def _machine() -> list[Check]:
    version = platform.python_version()
    return [
        Check("Python", sys.version_info >= (3, 11), f"{version} ({sys.executable})"),
        Check("ulae-rt", True, ulae_rt.__version__),
        *_processor(),
        _memory(),
        *_gpus(),
    ]


def _processor() -> Iterator[Check]:
    name, flags = machine.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("processor", True, f"{name}, {cores} cores to use")

    vector = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    if "amx_bf16" in flags:
        yield Check("fast bf16 on CPU", True, f"{vector} and AMX: --precision bf16 pays here")
    elif flags & machine.BF16_FLAGS:
        yield Check("fast bf16 on CPU", True, f"{vector} with bf16 products, no AMX")
    else:
        yield Check(
            "fast bf16 on CPU", False, f"{vector}, no bf16 instructions: fp32 is the faster"
        )


def _memory() -> Check:
    fields = {}
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        fields[key] = int(value.split()[0]) * 1024
    if "MemTotal" not in fields:
        return Check("memory", True, "size unknown")
    total, free = fields["MemTotal"], fields.get("MemAvailable", fields["MemTotal"])
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        free = min(free, total - int(used)) if used.isdigit() else min(free, total)
    detail = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    if free < NEEDED_MEMORY:
        hint = "close other programs; a registration at 1 mm may take 3 GiB"
        return Check("memory", False, detail, hint)
    return Check("memory", True, detail)


def _gpus() -> list[Check]:
    """What the driver says, without a CUDA context of our own."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Check("GPU", False, "none found (no nvidia-smi)", "everything runs without one")]
    query = "name,memory.total,compute_cap,driver_version"
    try:
        answer = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except subprocess.CalledProcessError as error:
        return [Check("GPU", False, _line(error.stdout or error.stderr or str(error)))]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Check("GPU", False, _line(str(error)))]
    rows = []
    for line in answer.strip().splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4:
            continue
        name, memory, capability, driver = fields
        size = f"{int(memory) / 1024:.0f} GiB, " if memory.isdigit() else ""
        detail = f"{name}, {size}sm{capability.replace('.', '')}, driver {driver}"
        rows.append(Check("GPU", True, detail))
    return rows or [Check("GPU", False, "nvidia-smi lists none")]


def _capabilities() -> list[Check]:
    with _quiet():
        torch = _load("torch")
        return [
            _weights(),
            _torch(torch),
            cuda := _cuda(torch),
            _triton(torch, cuda),
            *_onnxruntime(),
            _pt2(torch),
            *_tensorrt("tensorrt"),
            *_tensorrt("tensorrt-rtx"),
            _bindings(),
            _group("export to ONNX", ["torch", "onnx", "onnxscript"], "export"),
            _group("train", ["torch", "safetensors", "pydantic", "tensorboard"], "train"),
        ]


def _weights() -> Check:
    folder = Path(ulae_rt.__file__).parent / "model" / "weights"
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return Check(
            "default weights", False, "none in this installation", "name a file with --weights"
        )
    rows = [f"{path.name}, {path.stat().st_size / 1e6:.1f} MB{_card(path)}" for path in files]
    return Check("default weights", True, "; ".join(rows))


def _card(path: Path) -> str:
    """What the weights say about themselves, in one line; their header is JSON after 8 bytes."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 2**24)))
        card = json.loads(header["__metadata__"][METADATA_KEY])
        grid = "x".join(str(length) for length in card["shape"])
        return (
            f": {card['variant']}, {grid} at {card['spacing_mm']:g} mm, "
            f"trained on {card['training_data'] or 'unknown data'}, "
            f"licence {card['licence'] or 'unknown'}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return " (its header cannot be read)"


def _torch(torch: ModuleType | str) -> Check:
    name = "--backend torch"
    if isinstance(torch, str):
        return Check(name, False, torch, "pip install 'ulae-rt[torch]'")
    if isinstance(safetensors := _load("safetensors"), str):
        return Check(name, False, safetensors, "pip install 'ulae-rt[torch]'")
    return Check(name, True, f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def _cuda(torch: ModuleType | str) -> Check:
    name = "--device cuda"
    if isinstance(torch, str):
        return Check(
            name, False, torch, "install a CUDA build of torch, then pip install 'ulae-rt[gpu]'"
        )
    if torch.version.cuda is None:
        detail = f"torch {torch.__version__} is a build without CUDA"
        return Check(name, False, detail, "where there is a GPU, install a CUDA build of torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = _line(str(caught[0].message)) if caught else "no usable GPU"
        return Check(name, False, f"torch for CUDA {torch.version.cuda}: {why}")
    devices = torch.cuda.device_count()
    return Check(name, True, f"torch for CUDA {torch.version.cuda}, {devices} device(s)")


def _triton(torch: ModuleType | str, cuda: Check) -> Check:
    """Whether CUDA tensors can take the Triton kernels; where they cannot, the references run."""
    name = "Triton kernels"
    triton = _load("triton")
    if isinstance(triton, str) or isinstance(torch, str):
        missing = triton if isinstance(triton, str) else torch
        detail = f"{missing}; the reference operations run"
        return Check(name, False, detail, "where there is a GPU: pip install 'ulae-rt[gpu]'")
    found = f"triton {triton.__version__}"
    if not cuda.ok:
        detail = f"{found} but no CUDA device; the reference operations run"
        return Check(name, False, detail, "TRITON_INTERPRET=1 runs them on the CPU, only for tests")
    if env.triton_interprets():
        detail = f"{found}, which TRITON_INTERPRET=1 makes run them in Python, only for tests"
        return Check(name, False, detail, "unset TRITON_INTERPRET")
    if not (env.c_compiler() or shutil.which("clang") or shutil.which("gcc")):
        detail = f"{found}, but no C compiler, which it starts kernels with"
        return Check(name, False, detail, "install gcc, or set ULAE_RT_KERNELS=reference")
    return Check(name, True, f"{found}: CUDA tensors take them")


def _onnxruntime() -> Iterator[Check]:
    name = "--backend onnxruntime"
    onnxruntime = _load("onnxruntime")
    if isinstance(onnxruntime, str):
        yield Check(name, False, onnxruntime, "pip install onnxruntime")
        return
    providers = onnxruntime.get_available_providers()
    known = [provider.removesuffix("ExecutionProvider") for provider in providers]
    short = [provider for provider in known if provider != "Azure"]  # in every build, remote only
    yield Check(name, True, f"onnxruntime {onnxruntime.__version__}: {', '.join(short)}")
    cuda = f"{name}, CUDA"
    replace = "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        detail = "onnxruntime and onnxruntime-gpu are both installed, one over the other"
        yield Check(cuda, False, detail, replace)
    elif "CUDAExecutionProvider" not in providers:
        yield Check(
            cuda, False, "this build runs on the CPU only", f"where there is a GPU: {replace}"
        )
    elif [int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2]] < [1, 25]:
        detail = f"onnxruntime {onnxruntime.__version__} samples volumes on the CPU only"
        yield Check(cuda, False, detail, "pip install 'onnxruntime-gpu>=1.25'")
    else:
        yield Check(cuda, True, "its libraries are loaded when a session asks for them")


def _pt2(torch: ModuleType | str) -> Check:
    name = "--backend pt2"
    if isinstance(torch, str):
        return Check(name, False, torch, "pip install 'ulae-rt[torch]'")
    minor = ".".join(torch.__version__.split(".")[:2])
    where = "for the CPU" + (f" and for {_names_of_gpus()}" if machine.gpus() else "")
    return Check(name, True, f"files that torch {minor} made, {where}")


def _tensorrt(kind: str) -> Iterator[Check]:
    """Whether its engines can be run, and whether they can be built: the latter takes less."""
    run, build = f"--backend {kind}", f"export to {kind}"
    install = f"pip install 'ulae-rt[{kind}]'"
    library = _load(module := machine.TENSORRT_MODULES[kind])
    if isinstance(library, str):
        yield Check(run, False, library, install)
        yield Check(build, False, library, install)
        return
    found = f"{module} {getattr(library, '__version__', '(version unknown)')}"
    bindings = _load("cuda.bindings.runtime")
    if not machine.gpus():
        yield Check(run, False, f"{found}, but no NVIDIA GPU", "use another backend here")
    elif isinstance(bindings, str):
        detail = bindings.replace("cuda.bindings.runtime", "cuda-bindings")
        yield Check(run, False, f"{found}, but {detail}", install)
    else:
        yield Check(run, True, f"{found}, for {_names_of_gpus()}")
    if kind == "tensorrt-rtx":
        yield Check(build, True, f"{found} builds without a GPU, for RTX GPUs and sm80")
    elif machine.gpus():
        yield Check(build, True, f"{found}, for {_names_of_gpus()}")
    else:
        detail = f"{found}, but it builds on the GPU it is for, and here is none"
        yield Check(
            build,
            False,
            detail,
            "export on that machine, or here with --format tensorrt-rtx --target sm89",
        )


def _bindings() -> Check:
    name = "cuda-bindings"
    runtime, library = _load("cuda.bindings.runtime"), _load("cuda.bindings")
    if isinstance(runtime, str) or isinstance(library, str):
        missing = runtime if isinstance(runtime, str) else str(library)
        detail = missing.replace("cuda.bindings.runtime", name)
        return Check(name, False, detail, "to run TensorRT: pip install 'ulae-rt[tensorrt]'")
    return Check(name, True, f"{library.__version__}, through which TensorRT's engines run")


def _names_of_gpus() -> str:
    return ", ".join(sorted({f"{gpu.name} (sm{gpu.sm})" for gpu in machine.gpus()}))


def _engines(folder: Path) -> list[Check]:
    """What `load_engine` would take of a folder, first, and what it thinks of the others."""
    with _quiet():
        try:
            candidates = survey(folder)
        except UlaeError as error:
            return [Check(str(folder), False, " ".join(str(error).split()), error.hint)]
    return [_engine(candidate) for candidate in candidates]


def _engine(candidate: Candidate) -> Check:
    name = candidate.artefact.name + (f" on {candidate.device}" if candidate.device else "")
    if candidate.refusal is not None:
        reason = " ".join(str(candidate.refusal).split())
        return Check(name, False, reason, candidate.refusal.hint)
    seconds = candidate.seconds
    taken = "not timed here" if seconds is None else f"{seconds:.3g} s a pair here"
    loose = "" if candidate.manifest is None else loosened(candidate.manifest)
    if loose:
        taken += f"; verified with a looser tolerance: {loose}"
    return Check(name, True, f"{'chosen: ' if candidate.chosen else ''}{taken}")


def _group(name: str, modules: list[str], extra: str) -> Check:
    found = []
    for module in modules:
        library = _load(module)
        if isinstance(library, str):
            return Check(name, False, library, f"pip install 'ulae-rt[{extra}]'")
        found.append(f"{module} {getattr(library, '__version__', '')}".strip())
    return Check(name, True, ", ".join(found))


def _load(module: str) -> ModuleType | str:
    """The module, or why there is none: not installed, or broken in whatever way it is."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"{module} is not installed"
        return f"{module} is installed but needs {error.name}"
    except Exception as error:  # a broken library is a finding here, never the end
        return f"{module} is installed but broken: {_line(str(error)) or type(error).__name__}"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries greet and warn while they load; the table is what the reader asked for."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("doctor"))
