"""Entry point: `torchrun --nproc-per-node 8 pretrain_lens.py --config configs/demo.yaml [section.option=value ...]`."""

import sys

if __name__ == "__main__":
    try:
        from lens_megatron.train import main  # seconds of imports, which Ctrl-C may interrupt

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
