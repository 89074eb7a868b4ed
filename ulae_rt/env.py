"""Every environment variable the package reads, in one place (README lists them)."""

import os

from ulae_rt.errors import UsageError

KERNEL_CHOICES = ("auto", "reference", "triton")


def kernels() -> str:
    """``ULAE_RT_KERNELS``: which implementation of the ops runs, ``auto`` by default."""
    choice = os.environ.get("ULAE_RT_KERNELS", "auto")
    if choice not in KERNEL_CHOICES:
        raise UsageError(
            f"ULAE_RT_KERNELS is {choice!r}, expected one of {', '.join(KERNEL_CHOICES)}",
            "unset ULAE_RT_KERNELS to let the device decide",
        )
    return choice


def triton_interprets() -> bool:
    """``TRITON_INTERPRET``: whether Triton runs kernels on the CPU, statement by statement."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def c_compiler() -> str | None:
    """``CC``: the compiler that Triton builds what starts its kernels with."""
    return os.environ.get("CC")


def data_dir() -> str | None:
    """``ULAE_RT_DATA``: the folder with the evaluation data that tests and benches use."""
    return os.environ.get("ULAE_RT_DATA")


def with_itk_threads(count: int) -> dict[str, str]:
    """The environment of a process whose ITK is to have ``count`` threads."""
    return {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(count)}


def let_torch_threads_sleep() -> None:
    """``OMP_WAIT_POLICY``: torch's threads that wait for one another leave the core to others.

    By default they spin, in the way of what else runs: those that read and write beside the network
    in ``batch``, and other processes of the machine. Two ``register --refine 10`` side by side on
    two cores took 41 s so, and 20 s with threads that sleep; one alone takes as long either way. It
    must be said before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def silence_ray_usage_report() -> None:
    """``RAY_USAGE_STATS_ENABLED``: a Ray that is started here sends nothing to its makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
