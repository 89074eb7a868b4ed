"""The operations registration is made of, as differentiable functions of torch tensors.

One folder an op: ``reference.py`` is the specification in plain torch, ``kernel.py`` the Triton
kernels, ``op.py`` the registered operators and the public function, which takes the one or the
other. Conventions: :mod:`ulae_rt.conventions`.
"""

from ulae_rt.kernels.affine_normal_equations.op import affine_normal_equations
from ulae_rt.kernels.compose.op import compose
from ulae_rt.kernels.diffusion.op import diffusion, diffusion_with_gradient
from ulae_rt.kernels.lncc.op import LnccTo, lncc, multi_window_lncc, weighted_lncc
from ulae_rt.kernels.moving_block.op import moving_block
from ulae_rt.kernels.norm_activate.op import norm_activate
from ulae_rt.kernels.resize.op import resize_displacement
from ulae_rt.kernels.sample_world.op import sample_world
from ulae_rt.kernels.upsample_concat.op import upsample_concat
from ulae_rt.kernels.warp.op import warp
from ulae_rt.kernels.warp_compose.op import warp_compose
from ulae_rt.kernels.world_displacement.op import world_displacement
from ulae_rt.kernels.world_jacobian.op import world_jacobian

__all__ = [
    "LnccTo",
    "affine_normal_equations",
    "compose",
    "diffusion",
    "diffusion_with_gradient",
    "lncc",
    "moving_block",
    "multi_window_lncc",
    "norm_activate",
    "resize_displacement",
    "sample_world",
    "upsample_concat",
    "warp",
    "warp_compose",
    "weighted_lncc",
    "world_displacement",
    "world_jacobian",
]
