"""Runs tools/compare/gradients.py as torchrun would, for tests that start a program by its path."""

import sys

from lens_megatron.tools.compare.gradients import main

if __name__ == "__main__":
    sys.exit(main())
