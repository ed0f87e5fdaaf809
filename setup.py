"""For setuptools, which looks for this name: everything is in build.py."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from build import main

main()
