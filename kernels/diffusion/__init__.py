"""The op ``diffusion``."""
