"""How cuDNN is to convolve, the same wherever the network runs."""

from contextlib import AbstractContextManager


def exact_convolutions() -> AbstractContextManager[None]:
    """float32 means float32, and cuDNN keeps the fastest of its ways once it has tried them.

    Unless told otherwise torch lets cuDNN round float32 convolutions to TF32; a displacement of 20
    voxels would be off by hundredths of one. Sizes do not change, so trying pays. What it costs is
    repeatability on a GPU: another run may find another way the fastest, whose sums round
    otherwise in the last bits. On a CPU nothing of this has an effect.
    """
    import torch

    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
