"""One rank of a world that hangs on purpose. Arguments: folder, how, late rank.

how: `late` one rank sleeps before a collective; `earlier` it never leaves the phase before; `locked` it holds Python's
lock in C code; `frozen` it is stopped by a signal; `fine` nobody hangs, and several deadlines pass.
"""

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from lens_megatron.policy import platform
from lens_megatron.supervision.clock import Clock
from lens_megatron.supervision.watchdog import watch

TIMEOUT_S = 3.0
LATE = 1


def hold_lock(seconds: int) -> None:
    ctypes.PyDLL(None).sleep(seconds)  # PyDLL, unlike CDLL, keeps the lock


def main() -> None:
    folder, how, late = sys.argv[1:]
    rank = os.environ["RANK"]
    is_late = rank == late
    torch.distributed.init_process_group("gloo")
    if how == "fine":  # shorter than a test stops its ranks for
        torch.distributed.barrier()
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2 * TIMEOUT_S))
    control = platform.open_control_store(torch.device("cpu"))
    clock = Clock()
    clock.step = 7
    with watch(clock, control, Path(folder), TIMEOUT_S / 60):
        (Path(folder) / f"begun_{rank}").touch()
        with clock("gen"):
            if how == "earlier" and is_late:
                time.sleep(60)
        for _ in range(5):
            with clock("update_actor"):
                torch.distributed.all_reduce(torch.ones(1))
                time.sleep(TIMEOUT_S / 2 * (how == "fine"))
        with clock("update_actor"):
            if how == "late" and is_late:
                time.sleep(60)
            time.sleep(TIMEOUT_S / 4 * (how in ("locked", "frozen")))  # a heartbeat from this phase
            if how == "locked" and is_late:
                hold_lock(60)
            if how == "frozen" and is_late:
                os.kill(os.getpid(), signal.SIGSTOP)
            torch.distributed.all_reduce(torch.ones(1))
    torch.distributed.destroy_process_group()
    control.close()


if __name__ == "__main__":
    main()
