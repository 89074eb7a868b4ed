"""The Jacobian determinant of a displacement in mm, on a grid of any orientation."""
