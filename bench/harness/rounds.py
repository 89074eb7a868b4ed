"""Contenders timed in turn."""

import math
import time
from collections.abc import Callable, Mapping

import torch

# Rounds below which a median is none.
LEAST = 3


def interleaved(
    contenders: Mapping[str, Callable[[], float]], rounds: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each contender, which each times itself, all of them in turn.

    In turn, so that a machine that drifts drifts for all of them alike.

    Args:
        contenders: each runs once and returns its seconds.
        rounds: so many, or as many as fit into ``seconds``, but three at least.
        seconds: what all of it may take, about.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for turn in range(rounds):
        spent = time.perf_counter() - started
        if turn >= LEAST and spent * (turn + 1) / turn > seconds:
            break
        for name, run in contenders.items():
            found[name].append(run())
    return found


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
