"""Times an all-reduce over all ranks of a torchrun; rank 0 prints the bus bandwidth as one line of JSON."""

import json
import os
import time

import torch

WARM_UP, REPEATS = 5, 20
ELEMENTS, ELEMENTS_CPU = 1 << 27, 1 << 20
"""Elements of the float32 tensor: half a gigabyte on GPUs, where a smaller one would measure latency."""


def bus_gb_s(size: int, ranks: int, seconds: float) -> float:
    """The gigabytes per second that every link carries in a ring: 2 (n - 1) / n of the tensor, as nccl-tests counts.

    Example: 4e9 bytes over 8 ranks in 0.07 s: 100 GB/s.
    """
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def main() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    data = torch.zeros(ELEMENTS if cuda else ELEMENTS_CPU, device="cuda" if cuda else "cpu")

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            torch.distributed.all_reduce(data)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    run(WARM_UP)
    seconds = run(REPEATS)
    if torch.distributed.get_rank() == 0:
        ranks = torch.distributed.get_world_size()
        print(json.dumps({"ranks": ranks, "gb_s": bus_gb_s(data.numel() * 4, ranks, seconds)}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
