"""``python -m dp_extproc.engine``."""

import sys

from dp_extproc.engine.command import main

sys.exit(main())
