"""ULAE-net and its weights."""

from ulae_rt.model.checkpoint import load_model, save_checkpoint
from ulae_rt.model.metadata import Metadata
from ulae_rt.model.ulae_net import Prediction, RegistrationOutput, UlaeNet

__all__ = [
    "Metadata",
    "Prediction",
    "RegistrationOutput",
    "UlaeNet",
    "load_model",
    "save_checkpoint",
]
