"""Imaging: NIfTI files, grids, affine alignment, deformations. numpy and SimpleITK, no torch."""
