"""Entry point: `torchrun --nproc-per-node 8 pretrain_lens.py --config configs/demo.yaml [section.option=value ...]`."""

import os
import signal
import sys

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the imports take seconds, and nothing has begun
        signal.signal(number, lambda *_: os._exit(0))
    try:
        from lens_megatron.train import main  # seconds of imports, which Ctrl-C may interrupt

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
