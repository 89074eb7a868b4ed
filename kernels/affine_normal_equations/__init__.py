"""The sums that an affine alignment by least squares takes its steps from."""
