"""Weights to verified engines: ``python -m ulae_rt.export --weights FILE``."""

from ulae_rt.export.config import ExportConfig

__all__ = ["ExportConfig"]
