"""The operations registration is made of, as differentiable functions of torch tensors.

One folder an op: ``reference.py`` is the specification in plain torch, ``op.py`` the public
function. Conventions: :mod:`ulae_rt.conventions`.
"""

from ulae_rt.kernels.compose.op import compose
from ulae_rt.kernels.diffusion.op import diffusion
from ulae_rt.kernels.lncc.op import lncc, multi_window_lncc
from ulae_rt.kernels.warp.op import warp
from ulae_rt.kernels.warp_compose.op import warp_compose

__all__ = ["compose", "diffusion", "lncc", "multi_window_lncc", "warp", "warp_compose"]
