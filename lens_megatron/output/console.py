"""Prints the messages of the project's loggers, and every error once, whichever ranks meet it."""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's own documented name
from tqdm import tqdm

PROJECT = "lens_megatron"
ABOUT_ONE_RANK = ("lens_megatron.rollout.servers", "lens_megatron.rollout.unfinished")
"""Loggers whose messages every rank shows: they are about the rank's own servers and files, not those of rank 0."""
HEAD_START_S = 1.0
"""Seconds that other ranks wait before they report an error, so that rank 0 reports an error that all ranks find."""
PATIENCE = timedelta(seconds=5)


class ConsoleHandler(logging.Handler):
    """Prints `text`, `warning: text` or `error: text` on stdout; on other ranks than 0 with `rank N: ` before it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print_text(f"{_rank_prefix()}{level}{self.format(record)}")
        except Exception:
            self.handleError(record)


@contextmanager
def messages_on_console() -> Iterator[None]:
    """Shows on the console, within the block, what the project's modules log from level info on."""
    project, handler = logging.getLogger(PROJECT), ConsoleHandler()
    project.addHandler(handler)
    project.propagate = False  # a library may have given the root logger a handler of its own
    set_level("info")
    try:
        yield
    finally:
        project.removeHandler(handler)
        project.propagate = True
        for name in (PROJECT, *ABOUT_ONE_RANK):
            logging.getLogger(name).setLevel(logging.NOTSET)


def set_level(name: str) -> None:
    """Shows messages from level `name` (debug, info, warning, error) on; other ranks than 0 show no less than warnings.

    Messages of the loggers in ABOUT_ONE_RANK are shown on every rank.
    """
    level = logging.getLevelNamesMapping()[name.upper()]
    logging.getLogger(PROJECT).setLevel(max(level, logging.WARNING) if _rank() else level)
    for logger in ABOUT_ONE_RANK:
        logging.getLogger(logger).setLevel(level)


def report_error(text: str) -> None:
    """Logs `text` as an error, unless another rank has reported the same."""
    if _rank():
        time.sleep(HEAD_START_S)
    if _is_first(text):
        logging.getLogger(__name__).error(text)


def _is_first(text: str) -> bool:
    """Returns whether no other rank has claimed `text` in torchrun's store. True where the store cannot be asked: an
    error that is printed twice is better than one that is never printed."""
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


def print_text(text: str) -> None:
    """Prints `text`; characters that the console's encoding lacks, such as half of one in a file's name, are escaped.

    A progress bar is drawn again below the text. A console that cannot be written to, because its file is on a full
    disk, must not end a run.
    """
    encoding = sys.stdout.encoding or "utf-8"
    with suppress(OSError), tqdm.external_write_mode(file=sys.stdout):
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True, file=sys.stdout)


def leave_console() -> None:
    """Flushes the console before the process ends: Python would exit with 120 if its own flush failed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _rank_prefix() -> str:
    return f"rank {_rank()}: " if _rank() else ""
