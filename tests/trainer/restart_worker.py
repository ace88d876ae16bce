"""One rank under `torchrun --max-restarts 1`: the last rank dies once, and the next attempt must come together."""

import os
import signal

import torch

from lens_megatron.policy import platform


def main() -> None:
    platform.init_process_group(torch.device("cpu"), timeout_minutes=1)
    torch.distributed.new_group()
    torch.distributed.barrier()
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    if last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
