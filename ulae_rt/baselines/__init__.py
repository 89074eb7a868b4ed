"""Registration by other packages, with the inputs, the affine and the outputs of ours."""
