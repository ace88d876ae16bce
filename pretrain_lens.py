"""Entry point: `torchrun --nproc-per-node 8 pretrain_lens.py --config configs/demo.yaml [section.option=value ...]`."""

import sys

from lens_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
