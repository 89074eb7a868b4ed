"""The op ``compose``."""
