"""Writes logs that a run can do without: a log that cannot be written causes a warning and never ends the run."""

import logging
from pathlib import Path

from lens_megatron.files import append_whole, write_atomically

logger = logging.getLogger(__name__)

MAX_WAITING = 64 << 20
"""The most bytes that a log keeps in memory while they cannot be written."""


class SideLog:
    """A file that records are appended to: each as a whole, and later when the disk has no room for it now.

    Args:
        content: replaces the content of the file before anything is appended; None keeps it.
    """

    def __init__(self, path: Path, content: bytes | None):
        self.path = path
        self._content = content
        self._waiting: list[bytes] = []
        self._lost = 0
        self._failing = False
        self._write()

    def append(self, record: bytes) -> None:
        if sum(map(len, self._waiting)) + len(record) > MAX_WAITING:
            self._lost += 1
        else:
            self._waiting.append(record)
        self._write()

    def replace_last(self, record: bytes) -> None:
        """Replaces the last record by `record`, one line; appends it where the last one cannot be read again."""
        if self._waiting:
            self._waiting[-1] = record
        else:
            try:
                lines = self.path.read_bytes().splitlines(keepends=True)
                self._content = b"".join((*lines[:-1], record))
            except OSError:
                self._waiting.append(record)
        self._write()

    def close(self) -> None:
        """Tries once more to write the waiting records. Logs how many are lost."""
        if self._waiting or self._content is not None:
            self._write()
        if self._failing:
            logger.warning(f"{self.path} lacks its last {len(self._waiting) + self._lost} records")

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)
            if self._content is not None:
                write_atomically(self.path, self._content)
                self._content = None
            append_whole(self.path, b"".join(self._waiting))
        except OSError as error:
            if not self._failing:
                logger.warning(
                    f"{self.path} cannot be written: {error}; training goes on, and writes what is missing as "
                    "soon as it can"
                )
            self._failing = True
            return
        if self._failing:
            lost = f"{self._lost} records are lost" if self._lost else "nothing is lost"
            logger.info(f"{self.path} can be written again; {lost}")
        self._waiting, self._lost, self._failing = [], 0, False
