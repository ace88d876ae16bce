"""`python -m lens_megatron.plan` is this command; what it does is in tools/plan.py."""

import sys

from lens_megatron.tools.plan import main

if __name__ == "__main__":
    sys.exit(main())
