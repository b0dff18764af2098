"""``python -m dp_extproc`` is the same as the ``dp-extproc`` command."""

import sys

from dp_extproc.cli import main

sys.exit(main())
