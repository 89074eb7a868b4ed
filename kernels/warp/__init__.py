"""The op ``warp``."""
