"""Folders of engines that compute next to nothing, and the machines they are asked to run on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from ulae_rt.engines.machine import Gpu
from ulae_rt.manifest import (
    ANY_BATCH,
    TOLERANCES,
    UNITS,
    VERIFIED,
    EngineMetadata,
    Manifest,
    Measured,
    TensorSpec,
    Work,
    manifest_path,
    preprocessing_of,
    sha256,
)

SHAPE = (4, 6, 5)
SUFFIXES = {"onnx": "onnx", "pt2": "pt2", "tensorrt": "engine", "tensorrt-rtx": "engine"}


def spec(name: str, channels: int, batch: int) -> TensorSpec:
    components = ("d", "h", "w") if channels == 3 else ("intensity",)
    return TensorSpec(name, (batch, channels, *SHAPE), "float32", UNITS[name], components)


def measured(on: str = "x86", seconds: float = 0.1) -> Measured:
    return Measured("noise", "a runtime", on, seconds, 3.0, 1e-6, 1e-5, 1e-4, 1e-7, 1e-6, 0)


def make_manifest(content: bytes, artefact: str, batch: int = 1, **changes: Any) -> Manifest:
    manifest = Manifest(
        artefact=artefact,
        kind="onnx",
        precision="fp32",
        target="any",
        compatibility="none",
        inputs=(spec("moving", 1, batch), spec("fixed", 1, batch)),
        outputs=(spec("moved", 1, batch), spec("disp", 3, batch)),
        metadata=EngineMetadata("paper", SHAPE, 1.0, "max", "none", "CC0"),
        preprocessing=preprocessing_of(1.0, "max"),
        versions={"ulae-rt": "0.1.0"},
        work=Work(0.0, 1e-6, 3),
        types={},
        weights_sha256="0" * 64,
        artefact_sha256=sha256(content),
        status=VERIFIED,
        tolerance=TOLERANCES[changes.get("precision", "fp32")],
        errors=(measured(),),
        date="2026-01-01T00:00:00+00:00",
    )
    metadata = changes.get("metadata", manifest.metadata)
    steps = preprocessing_of(metadata.spacing_mm, metadata.normalisation)
    return dataclasses.replace(manifest, **{"preprocessing": steps, **changes})


def graph(batch: int = 1) -> bytes:
    """Three nodes in place of a network: moved = M + F, disp = three times M - F."""
    first: int | str = "batch" if batch == ANY_BATCH else batch
    images = [helper.make_tensor_value_info(n, 1, (first, 1, *SHAPE)) for n in ("moving", "fixed")]
    results = [
        helper.make_tensor_value_info("moved", 1, (first, 1, *SHAPE)),
        helper.make_tensor_value_info("disp", 1, (first, 3, *SHAPE)),
    ]
    size = helper.make_tensor("size", TensorProto.INT64, (5,), (1, 3, 1, 1, 1))
    nodes = [
        helper.make_node("Add", ["moving", "fixed"], ["moved"]),
        helper.make_node("Sub", ["moving", "fixed"], ["difference"]),
        helper.make_node("Expand", ["difference", "size"], ["disp"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "net", images, results, [size]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    content: bytes = model.SerializeToString()
    return content


def write_engine(folder: Path, stem: str = "", batch: int = 1, **changes: Any) -> Path:
    """One artefact and its manifest, whose fields are ``changes``; the folder."""
    folder.mkdir(exist_ok=True)
    kind = changes.get("kind", "onnx")
    content = graph(batch) if kind == "onnx" else b"a plan"
    stem = stem or f"ulae-net-{changes.get('precision', 'fp32')}"
    artefact = folder / f"{stem}.{SUFFIXES[kind]}"
    manifest = make_manifest(content, artefact.name, batch, **changes)
    artefact.write_bytes(content)
    manifest_path(artefact).write_text(manifest.to_json())
    return folder


def images(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).random((2, batch, 1, *SHAPE), dtype=np.float32)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pretend_machine(
    patch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...] = (),
    flags: frozenset[str] = frozenset(),
    processor: str = "this processor",
) -> None:
    """Another machine than the one the tests run on."""
    patch.setattr("ulae_rt.engines.machine.gpus", lambda: gpus)
    patch.setattr("ulae_rt.engines.machine.processor", lambda: (processor, flags))
    patch.setattr("ulae_rt.engines.folder.processor", lambda: (processor, flags))
