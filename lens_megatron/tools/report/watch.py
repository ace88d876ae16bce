"""Waits for runs to go on, and has their report written again each time."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between two looks. Polling also works on network file systems, which announce no changes."""


def watch(folders: Sequence[Path], write: Callable[[], None], sleep: Callable[[float], None] = time.sleep) -> None:
    """Calls `write` at once, and again whenever a metrics.jsonl in `folders` has changed. Returns after Ctrl-C.

    An error of the first `write` is raised. A file may be missing for a moment while a run is restarted, so a later
    error is logged, and the report stays as it is.
    """
    seen = _versions(folders)
    write()
    try:
        while True:
            sleep(POLL_S)
            now = _versions(folders)
            if now == seen:
                continue
            seen = now
            try:
                write()
            except Exception as error:
                logger.warning(f"the report stays as it is: {error}")
    except KeyboardInterrupt:
        return


def _versions(folders: Sequence[Path]) -> list[tuple[int, int] | None]:
    return [_version(folder / "metrics.jsonl") for folder in folders]


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
