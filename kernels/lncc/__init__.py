"""The op ``lncc``."""
