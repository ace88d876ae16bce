"""Entry: `torchrun --nproc-per-node N pretrain_lens.py --config configs/demo.yaml [section.option=value ...]`."""

import sys

if __name__ == "__main__":
    from lens_megatron.train import main

    sys.exit(main())
