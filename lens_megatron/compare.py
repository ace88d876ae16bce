"""`python -m lens_megatron.compare` is this command; what it does is in tools/compare/."""

import sys

from lens_megatron.tools.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
