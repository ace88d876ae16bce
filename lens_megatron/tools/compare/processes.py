"""Runs programs of this project under torchrun, and stops them with this process, in whatever way that ends."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

POLL_S = 0.5
SHUTDOWN_S = 120
"""The time that torchrun gives its ranks for their last save."""
_PR_SET_PDEATHSIG = 1
_LAST_LINES = 12


class Interrupted(KeyboardInterrupt):
    """SIGTERM asked this process to stop, as Ctrl-C does."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGTERM raises Interrupted in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def never() -> bool:
    """Lets a program run to its own end."""
    return False


def run(ranks: int, words: Sequence[str], log: Path, is_enough: Callable[[], bool] = never) -> int:
    """Runs a module under torchrun until it ends; returns torchrun's exit status.

    It is asked to stop by SIGTERM once `is_enough`, which is called twice a second, says so, and whenever an exception
    such as KeyboardInterrupt ends the wait; then its end is awaited.

    Args:
        words: the module and its arguments.
        log: what it prints is appended there.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("--shutdown-timeout", str(SHUTDOWN_S), "-m", *words),
    ]
    with log.open("ab") as file:
        child = _start(command, file.fileno())
    asked = False
    try:
        while child.poll() is None:
            if not asked and is_enough():
                child.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(POLL_S)
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    return child.returncode


def _start(command: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    """Starts a process that is asked to end when this one has ended, in whatever way."""
    own, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != own:
            os._exit(1)

    # A session of its own, so that Ctrl-C reaches this process alone, which then asks the ranks to stop.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def last_words(log: Path) -> str:
    """Returns the errors that a program printed, or else the last lines that it did."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith("error:")] or lines
    return "\n".join([f"{log} ends with:", *said[-_LAST_LINES:]])
