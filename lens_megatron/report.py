"""`python -m lens_megatron.report` is this command; what it does is in output/report.py."""

import sys

from lens_megatron.output.report import main

if __name__ == "__main__":
    sys.exit(main())
