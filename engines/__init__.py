"""Running verified engines. Needs neither torch nor the model, nor the exporter."""

from ulae_rt.engines.backends import BACKENDS
from ulae_rt.engines.folder import Candidate, load_engine, survey
from ulae_rt.engines.session import Engine, EngineOutput, ExportedEngine

__all__ = [
    "BACKENDS",
    "Candidate",
    "Engine",
    "EngineOutput",
    "ExportedEngine",
    "load_engine",
    "survey",
]
