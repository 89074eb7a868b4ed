"""The op ``norm_activate``."""
