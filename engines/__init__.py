"""Running verified engines. Needs neither torch nor the model, nor the exporter."""

from ulae_rt.engines.backends import BACKENDS
from ulae_rt.engines.session import Engine, EngineOutput, load_engine

__all__ = ["BACKENDS", "Engine", "EngineOutput", "load_engine"]
