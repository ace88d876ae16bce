"""What a rank says on its console, and when it cannot go on: every mistake once, whichever rank makes it."""

import hashlib
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore

HEAD_START_S = 1.0
"""What all ranks find, rank 0 says."""
PATIENCE = timedelta(seconds=5)


def say_error(text: str) -> None:
    """Prints `error: ...`, or `rank N: error: ...` on other ranks than 0, unless another rank has said the same."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(HEAD_START_S)
    if _is_first(text):
        say(f"rank {rank}: error: {text}" if rank else f"error: {text}")


def _is_first(text: str) -> bool:
    """By torchrun's store. True where it cannot be asked: twice is better than never."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"lens_errors/{attempt}/{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def say(text: str) -> None:
    """Prints what can be printed; the rest, such as half a character of a file's name, as an escape sequence.

    A console that takes nothing, because its file is on a full disk, must not end a run.
    """
    encoding = sys.stdout.encoding or "utf-8"
    with suppress(OSError):
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True, file=sys.stdout)


def leave_console() -> None:
    """To be called before the process ends: Python would exit with 120 where its last words find no room."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
