"""The whole displacement of a registration, in mm, on the fixed image's own grid."""
