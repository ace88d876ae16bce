"""Runs a command that must not outlive its parent:

    python -m lens_megatron.rollout.servers.end_with_parent [--remove FOLDER] PARENT_PID command...

It ends the command's whole process group when the parent has ended, in whatever way, or on SIGTERM. It ends when the
command does, and then removes the folder. It is a process of its own because a killed trainer can no longer end
anything, and a death signal would reach the trainer's child but not that child's children.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_S = 0.2
GRACE_S = 3.0
"""The time from SIGTERM to SIGKILL."""

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Returns the command's exit status, or 128 + the number of the signal that ended it."""
    arguments, folder, own = list(arguments), None, os.getpid()
    if arguments[0] == "--remove":
        _, folder, *arguments = arguments
    parent, command = int(arguments[0]), arguments[1:]
    prctl = ctypes.CDLL(None).prctl

    def die_with_the_guardian() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != own:
            os._exit(1)

    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C and ends its step first
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_the_guardian
    )
    while child.poll() is None and os.getppid() == parent and not asked:
        time.sleep(POLL_S)
    if asked and child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it left no process behind
    status = child.wait()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
