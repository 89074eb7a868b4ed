"""Arrows point one way: leaves, kernels, imaging, model, registration, commands; engines alone.

By reading the source, because import-graph tools do not see the mapped folders.
"""

import pytest

from _support.project import imports, modules

# Every module's layer: the longest prefix decides. A new module is given one here first.
LAYERS = {
    "ulae_rt": "package",
    "ulae_rt.__main__": "commands",
    "ulae_rt.allocator": "leaves",
    "ulae_rt.apply": "commands",
    "ulae_rt.arguments": "leaves",
    "ulae_rt.baselines": "baselines",
    "ulae_rt.batch": "commands",
    "ulae_rt.batching": "batching",
    "ulae_rt.cli": "commands",
    "ulae_rt.clock": "leaves",
    "ulae_rt.conventions": "leaves",
    "ulae_rt.convolutions": "leaves",
    "ulae_rt.displacement": "model",
    "ulae_rt.doctor": "commands",
    "ulae_rt.engines": "engines",
    "ulae_rt.env": "leaves",
    "ulae_rt.errors": "leaves",
    "ulae_rt.evaluate": "commands",
    "ulae_rt.evaluation": "evaluation",
    "ulae_rt.export": "export",
    "ulae_rt.files": "leaves",
    "ulae_rt.imaging": "imaging",
    "ulae_rt.kernels": "kernels",
    "ulae_rt.losses": "training",
    "ulae_rt.manifest": "leaves",
    "ulae_rt.messages": "leaves",
    "ulae_rt.metrics": "leaves",
    "ulae_rt.model": "model",
    "ulae_rt.optional": "leaves",
    "ulae_rt.options": "commands",
    "ulae_rt.pairs": "commands",
    "ulae_rt.prepare": "commands",
    "ulae_rt.refinement": "refinement",
    "ulae_rt.register": "commands",
    "ulae_rt.registration": "registration",
    "ulae_rt.reports": "leaves",
    "ulae_rt.samples": "leaves",
    "ulae_rt.strict_csv": "leaves",
    "ulae_rt.strict_json": "leaves",
    "ulae_rt.train": "commands",
    "ulae_rt.training": "training",
}

# The version is everybody's; what else "ulae_rt" offers is resolved on first use.
MAY_IMPORT = {
    "package": {"package", "model", "registration"},
    "leaves": {"package", "leaves"},
    "kernels": {"package", "leaves", "kernels"},
    "imaging": {"package", "leaves", "kernels", "imaging"},
    "model": {"package", "leaves", "kernels", "model"},
    "training": {"package", "leaves", "kernels", "model", "imaging", "training"},
    "engines": {"package", "leaves", "engines"},
    "export": {
        "package", "leaves", "kernels", "model", "imaging", "engines", "export", "commands",
    },
    "refinement": {"package", "leaves", "kernels", "model", "imaging", "refinement"},
    "registration": {
        "package", "leaves", "kernels", "model", "imaging", "engines", "refinement",
        "registration",
    },
    "baselines": {"package", "leaves", "imaging", "registration", "baselines"},
    "batching": {"package", "leaves", "imaging", "registration", "batching"},
    "evaluation": {"package", "leaves", "imaging", "batching", "evaluation"},
    "commands": {
        "package", "leaves", "kernels", "model", "imaging", "engines", "registration",
        "training", "baselines", "batching", "evaluation", "commands",
    },
}  # fmt: skip

# What may not be imported at all, and what not before a function asks for it.
NEVER = {
    "imaging": {"triton"},
    "engines": {"triton", "onnx", "onnxscript", "safetensors"},
    "evaluation": {"triton"},
    "leaves": {"triton", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"},
}
NOT_EAGERLY = {
    "package": {"torch", "numpy", "nibabel", "SimpleITK", "onnxruntime"},
    "leaves": {"torch"},
    "baselines": {"ants", "picsl_greedy"},
    "batching": {"ray", "torch"},
    "engines": {"torch", "tensorrt", "tensorrt_rtx", "onnxruntime"},
    "evaluation": {"scipy"},
    "kernels": {"tensorrt", "onnxruntime"},
    "export": {"tensorrt", "tensorrt_rtx"},
    "commands": {"torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "matplotlib"},
}

# What some modules alone may import: SimpleITK's world is LPS, and is met at the package's edge.
ONLY_IN = {
    "SimpleITK": {"ulae_rt.baselines.packages", "ulae_rt.imaging.chain", "ulae_rt.imaging.itk"}
}

# Every module runs the same three lines under `if __name__ == "__main__"`.
ALWAYS = {"ulae_rt.cli", "ulae_rt.cli.run_command"}


def layer(name: str) -> str | None:
    """The layer of the longest listed prefix; "ulae_rt" itself stands only for itself."""
    if name == "ulae_rt" or (name.startswith("ulae_rt.") and name.split(".")[1][:2] == "__"):
        return LAYERS.get(name, "package")
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        if found := LAYERS.get(".".join(parts[:length])):
            return found
    return None


def problems(name: str, source: str, known: set[str]) -> list[str]:
    own = layer(name)
    if own is None:
        return [f"{name} has no layer: add it to LAYERS"]
    found = []
    for item in imports(source):
        top = item.module.split(".")[0]
        where = f"{name}:{item.line} ({own}) imports {item.module}"
        if top == "ulae_rt":
            target = layer(item.module) if item.module in known else None
            entry = item.module in ALWAYS
            if target is not None and not entry and target not in MAY_IMPORT[own]:
                found.append(f"{where} ({target})")
        elif top in NEVER.get(own, ()) or name not in ONLY_IN.get(top, {name}):
            found.append(where)
        elif item.eager and top in NOT_EAGERLY.get(own, ()):
            found.append(f"{where} before a function asks for it")
        elif top in ("kernels", "export", "engines") or not top:
            found.append(where)
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_follow_the_arrows(name: str) -> None:
    assert not problems(name, modules()[name].read_text(), set(modules()))


def test_layers_name_only_what_exists() -> None:
    assert not set(LAYERS) - set(modules())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ulae_rt.engines.x", "import torch"),
        ("ulae_rt.engines.x", "def f():\n    from ulae_rt.model import UlaeNet"),
        ("ulae_rt.engines.x", "def f():\n    from ulae_rt import kernels"),
        ("ulae_rt.kernels.warp.op", "from ulae_rt import model"),
        ("ulae_rt.model.x", "from ulae_rt import losses"),
        ("ulae_rt.imaging.x", "def f():\n    import triton.language"),
        ("ulae_rt.imaging.x", "def f():\n    import SimpleITK as sitk"),
        ("ulae_rt.imaging.x", "from ulae_rt.registration.verdict import warn_unlike"),
        ("ulae_rt.registration.x", "from ulae_rt.batching.results import Row"),
        ("ulae_rt.batching.x", "from torch import Tensor"),
        ("ulae_rt.errors", "import ulae_rt.env, ulae_rt.kernels"),
        ("ulae_rt.training.x", "import kernels.warp"),
        ("ulae_rt.training.x", "from . import data"),
        ("ulae_rt.nowhere", ""),
    ],
)
def test_the_guard_sees(name: str, source: str) -> None:
    assert problems(name, source, set(modules()))


def test_the_guard_lets_pass() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    source += "def f():\n    import torch\n"
    assert not problems("ulae_rt.engines.x", source, set(modules()))
    source = "import torch\nfrom ulae_rt.kernels.sample_world.op import sample_world\n"
    assert not problems("ulae_rt.imaging.x", source, set(modules()))
    assert not problems("ulae_rt.imaging.itk", "import SimpleITK", set(modules()))
