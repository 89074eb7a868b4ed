"""Axes, units and geometry, stated once. Every other module refers here.

Volumes are ``(B, C, D, H, W)``. The tensor axes d, h, w are the array axes of a volume in RAS
orientation: d grows to the right, h to the front, w to the top of the head.

A displacement is ``(B, 3, D, H, W)``: component i moves along tensor axis i (d, h, w), in voxels of
the grid it lies on. It is a pull-back: ``warp(x, u)(p) = x(p + u(p))`` with voxel centres at the
integers and zero outside.

Composition: ``compose(a, b)(p) = a(p + b(p)) + b(p)``, so that
``warp(warp(x, a), b) = warp(x, compose(a, b))`` up to interpolation.

Source: ULAE-net, Eq. 2 of the paper; the released code's SpatialTransformer
(github.com/wanghaostu/ULAE-net, ULAE/ULAE.py at ac89ce5) has the same geometry.
"""

from typing import Literal

# The paper's grid: 160 x 192 x 160 voxels of 1 mm.
FULL_SHAPE = (160, 192, 160)
FULL_SPACING_MM = 1.0

# Four halvings in the encoder: every axis must be a multiple of this.
SIZE_MULTIPLE = 16

# How a pair is aligned before its displacement is found; see `ulae_rt.imaging.affine`.
AffineMode = Literal["none", "com", "affine"]
AFFINE_MODES: tuple[AffineMode, ...] = ("none", "com", "affine")
