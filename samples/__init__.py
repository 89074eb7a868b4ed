"""Two brains, to try things on (README.md beside this says where they come from)."""

from pathlib import Path

MOVING = Path(__file__).with_name("colin27_brain.nii.gz")
FIXED = Path(__file__).with_name("mni152_2009a_brain.nii.gz")
