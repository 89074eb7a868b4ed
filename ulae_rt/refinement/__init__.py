"""Instance optimisation: a pair's own displacement, improved from where the network left it."""

from ulae_rt.refinement.optimise import refine
from ulae_rt.refinement.schedule import Level, schedule

__all__ = ["Level", "refine", "schedule"]
