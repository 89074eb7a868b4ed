"""The op ``warp_compose``."""
