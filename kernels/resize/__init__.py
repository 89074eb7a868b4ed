"""The op ``resize_displacement``."""
