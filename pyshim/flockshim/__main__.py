"""``python -m flockshim``: the same as the ``flockshim`` command."""

import sys

from flockshim.cli import main

sys.exit(main())
