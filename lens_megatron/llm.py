"""`python -m lens_megatron.llm` is this command; what it does is in tools/llm/command.py."""

import sys

from lens_megatron.tools.llm.command import main

if __name__ == "__main__":
    sys.exit(main())
