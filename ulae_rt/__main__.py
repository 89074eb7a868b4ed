"""``python -m ulae_rt COMMAND``: the same as ``ulae-rt COMMAND``."""

import sys

from ulae_rt.cli import main

sys.exit(main())
