"""`python -m lens_megatron.doctor` is this command; what it does is in tools/doctor.py."""

import sys

from lens_megatron.tools.doctor import main

if __name__ == "__main__":
    sys.exit(main())
