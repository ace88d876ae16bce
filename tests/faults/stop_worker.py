"""One process that is told to stop: `stop_worker.py HOW`. It prints what it does, so that tests can see it.

alone      before ranks have met
nohup      likewise, where hang-ups are ignored
boundary   its step ends in time
stuck      its step does not end; a save takes a second
failing    likewise, and the disk is full
impatient  likewise, and a save takes an hour
lost       rank RANK of two, of which the last has gone
"""

import os
import signal
import sys
import time

import torch

from lens_megatron.output.console import messages_on_console
from lens_megatron.policy import platform
from lens_megatron.supervision.stop import Agree, Stop


class Step:
    """Implements LastStep."""

    def __init__(self, how: str):
        self.how = how

    def hold(self, seconds: float) -> int | None:
        return 7

    def release(self) -> None:
        print("released", flush=True)

    def is_saved(self) -> bool:
        return False

    def save(self, agree: Agree) -> str | None:
        print("saving", flush=True)
        time.sleep(3600 if self.how == "impatient" else 1)
        return agree("no space left" if self.how == "failing" else None)

    def abandon(self) -> None:
        print("abandoned", flush=True)


def main(how: str) -> int:
    device = platform.install()
    if how == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the program nohup does it before the process begins
    with messages_on_console(), Stop() as stop:
        print("listening", flush=True)
        if how in ("alone", "nohup"):
            time.sleep(3600)
        platform.init_process_group(device)
        stop.meet()
        stop.attach(Step(how))
        if how == "lost" and torch.distributed.get_rank() == 1:
            os._exit(9)
        print("training", flush=True)
        if how == "boundary":
            while not stop.agreed(device):
                time.sleep(0.05)
            stop.claim()
            time.sleep(8)
            print("saved by the main thread", flush=True)
        else:
            time.sleep(3600)
    torch.distributed.destroy_process_group()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert handlers == [signal.SIG_DFL] * 2, handlers
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
