"""Trains without a network, with the hub's cache in the folder TEST_HUB_CACHE: started by test_llm_hub.py.

The process is forked from one that has imported the hub's library, which read its environment then.
"""

import os
import sys

from huggingface_hub import constants

from lens_megatron.__main__ import main

if __name__ == "__main__":
    constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, os.environ["TEST_HUB_CACHE"]
    sys.exit(main())
