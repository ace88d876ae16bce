"""Training, from the shell: `torchrun pretrain_lens.py`, `torchrun -m lens_megatron` or, installed, `lens-train`."""

import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as `arguments` say, by default those of the process; returns the exit status, an `ExitCode`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the imports take seconds, and nothing has begun
        signal.signal(number, lambda *_: os._exit(0))
    try:
        from lens_megatron import command_line

        parsed = command_line.parse(arguments)  # before torch is imported, which takes seconds
        from lens_megatron import train

        return train.run(parsed)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
