"""The op ``upsample_concat``."""
