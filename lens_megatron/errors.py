"""What a rank says when it cannot go on: every mistake once, whichever rank makes it."""

import hashlib
import os
import sys
import time
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
        message = f"rank {rank}: error: {text}" if rank else f"error: {text}"
        encoding = sys.stdout.encoding or "utf-8"  # which may lack what stands in a file's name
        print(message.encode(encoding, "backslashreplace").decode(encoding), flush=True, file=sys.stdout)


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
