"""The names users rely on, their signatures, and that ``__all__`` says exactly what is public."""

import importlib
import inspect
from types import ModuleType

import pytest

import ulae_rt

NAMES = {
    "ulae_rt": {"Registrar", "load_model"},
    "ulae_rt.model": {"UlaeNet"},
    "ulae_rt.kernels": {
        "compose", "diffusion", "lncc", "multi_window_lncc", "warp", "warp_compose",
        "weighted_lncc",
    },
    "ulae_rt.engines": {"load_engine"},
}  # fmt: skip

EMPTY = inspect.Parameter.empty
SIGNATURES = {
    ("ulae_rt.kernels", "warp"): {
        "image": EMPTY, "disp": EMPTY, "padding": "zeros", "mode": "linear",
    },
    ("ulae_rt.kernels", "compose"): {"disp_a": EMPTY, "disp_b": EMPTY},
    ("ulae_rt.kernels", "warp_compose"): {"image": EMPTY, "disp_a": EMPTY, "disp_b": EMPTY},
    ("ulae_rt.kernels", "lncc"): {"x": EMPTY, "y": EMPTY, "window": 9, "eps": 1e-5},
    ("ulae_rt.kernels", "multi_window_lncc"): {
        "x": EMPTY, "y": EMPTY, "windows": (11, 9, 7), "eps": 1e-5,
    },
    ("ulae_rt.kernels", "weighted_lncc"): {
        "x": EMPTY, "y": EMPTY, "windows": EMPTY, "weights": EMPTY, "eps": 1e-5,
    },
    ("ulae_rt.kernels", "diffusion"): {"disp": EMPTY},
    ("ulae_rt.engines", "load_engine"): {"device": "auto"},
    ("ulae_rt.model", "UlaeNet"): {
        "variant": "paper", "channels": 16, "accumulate": True, "uncoupled": True,
    },
    ("ulae_rt", "Registrar"): {"device": "auto", "backend": "auto", "precision": "fp32"},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NAMES))
def test_promised_names_are_there_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) >= NAMES[name]
    for public in module.__all__:
        value = getattr(module, public)
        assert public == "__version__" or inspect.getdoc(value), f"{name}.{public}"


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ulae_rt"}))
def test_all_is_exactly_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(module.__all__)
    assert module.__all__ == sorted(module.__all__, key=lambda word: (word[0].islower(), word))


def test_lazy_names_resolve_and_others_do_not() -> None:
    for name in ulae_rt.__all__:
        assert getattr(ulae_rt, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ulae_rt.nothing


@pytest.mark.parametrize(("module", "name"), sorted(SIGNATURES))
def test_promised_arguments_have_the_promised_defaults(module: str, name: str) -> None:
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    for argument, default in SIGNATURES[module, name].items():
        found = parameters[argument].default
        assert (tuple(found) if isinstance(found, list) else found) == default, argument
