"""Ends a rank whose torchrun is gone: a torchrun killed with -9 cannot end its ranks, and nobody supervises them.

The rank sends itself SIGTERM first, so that the run saves its state and stops; after GRACE_S it ends in any case.
"""

import logging
import os
import signal
import threading
import time

import psutil

logger = logging.getLogger(__name__)

POLL_S = 1.0
GRACE_S = 60.0


def launcher() -> psutil.Process | None:
    """Returns torchrun's process, or None when it did not start this process or that cannot be determined.

    It is the nearest ancestor without the variables that torchrun sets for its ranks, since a script may run between
    the two. Where torchrun has died before, it is the process that has adopted this one.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        for ancestor in psutil.Process().parents():
            if ancestor.pid == 1 or "TORCHELASTIC_RUN_ID" not in ancestor.environ():
                return ancestor
    except (psutil.Error, OSError):
        pass
    return None


def end_with_launcher() -> None:
    """Starts a thread that ends this process soon after torchrun's has ended. Without torchrun it does nothing."""
    parent = launcher()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: psutil.Process) -> None:
    if runs_torch(parent):
        while _lives(parent):
            time.sleep(POLL_S)
    logger.warning(f"torchrun (process {parent.pid}) is gone; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)


def runs_torch(process: psutil.Process) -> bool:
    """Returns whether the process has loaded torch's libraries, as every launcher of ranks has.

    A process that has not loaded them adopted this one after its launcher died. True where neither can be determined.
    """
    try:
        with open(f"/proc/{process.pid}/maps", "rb") as maps:
            return any(b"libtorch" in line for line in maps)
    except PermissionError:
        return process.pid != 1  # the machine's first process is another user's, so it is not the launcher
    except OSError:
        return process.is_running()


def _lives(process: psutil.Process) -> bool:
    """Compares number and time of creation. A zombie that nobody has waited for does not live."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
