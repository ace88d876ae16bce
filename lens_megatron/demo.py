"""`python -m lens_megatron.demo` is this command; what it does is in tools/demo/make.py."""

import sys

from lens_megatron.tools.demo.make import main

if __name__ == "__main__":
    sys.exit(main())
