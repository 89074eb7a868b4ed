"""``python -m ulae_rt.export``."""

import sys

from ulae_rt.cli import run_command

sys.exit(run_command("export"))
