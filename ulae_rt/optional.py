"""Libraries that not every installation has: imported here, or refused with what to install."""

import importlib
from types import ModuleType

from ulae_rt.errors import BackendUnavailable


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the extra ``ulae-rt[extra]`` installs.

    Args:
        module: dotted name, e.g. ``"onnxruntime"``.
        extra: the optional dependency group of ``pyproject.toml`` that brings it.

    Raises:
        BackendUnavailable: if it is not installed, or is installed and does not import.
    """
    hint = f"pip install 'ulae-rt[{extra}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Something the library itself needs may be what is missing: name that, not the library.
        missing = error.name or module
        if module == missing or module.startswith(f"{missing}."):
            raise BackendUnavailable(f"{missing} is not installed", hint) from error
        raise BackendUnavailable(
            f"{module} cannot be imported: {missing} is not installed", hint
        ) from error
    except Exception as error:  # a wheel for another CPU, a CUDA library not found, a driver's no
        raise BackendUnavailable(
            f"{module} is installed but cannot be imported: {error}", f"reinstall it: {hint}"
        ) from error
