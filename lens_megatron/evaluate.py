"""`python -m lens_megatron.evaluate` is the command lens-eval; what it does is in tools/evaluate/."""

import sys

from lens_megatron.tools.evaluate.main import main

if __name__ == "__main__":
    sys.exit(main())
