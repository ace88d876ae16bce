"""Keeps what became of every case: one JSON object per line, written to the disk before the next case begins.

A session that is killed loses at most the case it was in. A line that cannot be read costs its own case only, which is
run again, and the summary names it.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Status(StrEnum):
    """The possible ends of a case."""

    PASSED = "passed"
    MEASURED = "measured"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It cannot run on this machine; the reason says what is missing."""
    INTERRUPTED = "interrupted"
    """The call's time was over; the next call runs it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Says how a case ended."""

    case: str
    status: Status
    reason: str = ""
    """Why it failed or was skipped or interrupted; empty otherwise."""
    headline: str = ""
    """What was found, in a line."""
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    """All that was found, as JSON."""
    log_tail: str = ""
    machine: str = ""
    """GPU and versions that it ran on."""
    commit: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """What earlier calls wrote."""

    outcomes: dict[str, Outcome]
    """The last outcome of each case, in the order in which they were written."""
    cut_off: Counter[str]
    """How often in a row a case was begun and nothing was written about its end."""
    unreadable: tuple[int, ...]
    """Lines that are no record, counted from 1."""


class JournalError(Exception):
    """The journal cannot be written; the message says where, why, and what to do."""


class Journal:
    """Appends to and reads `path`, whose folder is made."""

    def __init__(self, path: Path):
        self.path = path

    def started(self, case: str) -> None:
        """Notes that a case begins. Raises JournalError."""
        self._append({"event": "started", "case": case})

    def ended(self, outcome: Outcome) -> None:
        """Notes how a case ended. Raises JournalError."""
        self._append({"event": "ended", **asdict(outcome)})

    def read(self) -> Record:
        """Reads all lines. Raises JournalError if the file is there and cannot be read."""
        outcomes: dict[str, Outcome] = {}
        cut_off: Counter[str] = Counter()
        unreadable = []
        for number, line in enumerate(self._lines(), 1):
            if not line:
                continue
            try:
                event = json.loads(line)
                kind, case = event.pop("event"), event["case"]
                if kind == "started":
                    cut_off[case] += 1
                    continue
                outcome = Outcome(**event | {"status": Status(event["status"])})
            except (ValueError, KeyError, TypeError, AttributeError):
                unreadable.append(number)
                continue
            outcomes.pop(case, None)
            outcomes[case] = outcome
            del cut_off[case]
        return Record(outcomes, cut_off, tuple(unreadable))

    def _lines(self) -> list[bytes]:
        if not self.path.is_file():  # a device may have no end
            return []
        try:
            return self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read: {error.strerror}; give another --out") from error

    def _append(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # A line that was cut off must not swallow this one.
                file.write(line if self._ends_a_line() else b"\n" + line)
                file.flush()
                if self.path.is_file():
                    os.fsync(file.fileno())
        except OSError as error:
            raise JournalError(self._complaint(error)) from error

    def _ends_a_line(self) -> bool:
        if not self.path.is_file() or not self.path.stat().st_size:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _complaint(self, error: OSError) -> str:
        try:
            free = f"{shutil.disk_usage(self.path.parent).free / 2**20:.0f} MiB are free there"
        except OSError:
            free = "the folder cannot be looked at"
        return (
            f"{self.path}: cannot be written: {error.strerror}; {free}. No further case is run, since its result would "
            "be lost: make room or give another --out, and call again"
        )
