"""Ends a rank whose torchrun is gone: killed with -9, it can no longer end its ranks, and nobody supervises them.

An ordinary SIGTERM comes first, so that the run saves what it has and stops; after GRACE_S the process ends regardless.
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
    """torchrun's process; None when this process was not started by it, or that cannot be told.

    It is the nearest ancestor without the variables that torchrun sets for its ranks: a script may stand between. Where
    torchrun has died before, it is whoever has taken this process over.
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
    """Starts a thread that ends this process soon after torchrun's has gone. Without torchrun: nothing."""
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
    """Every launcher of ranks has torch's libraries loaded. One that died before this process could look has been
    replaced as its parent by a process that has not. True where that cannot be told."""
    try:
        with open(f"/proc/{process.pid}/maps", "rb") as maps:
            return any(b"libtorch" in line for line in maps)
    except PermissionError:
        return process.pid != 1  # the machine's first process is another user's: not the launcher of this one's
    except OSError:
        return process.is_running()


def _lives(process: psutil.Process) -> bool:
    """By number and time of creation; a zombie that nobody has waited for does not live."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
