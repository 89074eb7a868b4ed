"""Deployment runtime for learned deformable brain registration (ULAE-net, MICCAI 2021)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Registrar", "__version__", "load_model"]

if TYPE_CHECKING:
    from ulae_rt.model import load_model
    from ulae_rt.registration import Registrar


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing the package must not import torch (0.3 s budget, engines
    # run without it).
    if name == "load_model":
        from ulae_rt.model import load_model

        return load_model
    if name == "Registrar":
        from ulae_rt.registration import Registrar

        return Registrar
    raise AttributeError(f"module 'ulae_rt' has no attribute {name!r}")
