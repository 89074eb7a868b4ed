"""The op ``moving_block``."""
