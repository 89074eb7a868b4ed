"""Registration: two scans in, one aligned to the other, all of it on one device."""

from typing import TYPE_CHECKING, Any

from ulae_rt.optional import require

__all__ = ["Registrar", "Result", "Stats"]

if TYPE_CHECKING:
    from ulae_rt.registration.registrar import Registrar
    from ulae_rt.registration.result import Result, Stats


def __getattr__(name: str) -> Any:
    # Resolved on first use: a command looks at its files before torch is loaded.
    if name not in __all__:
        raise AttributeError(f"module 'ulae_rt.registration' has no attribute {name!r}")
    require("torch", "torch")
    from ulae_rt.registration import registrar, result

    return getattr(registrar if name == "Registrar" else result, name)
