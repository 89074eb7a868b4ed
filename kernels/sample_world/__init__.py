"""An image sampled through an affine matrix and a displacement, on a grid of any other size."""
