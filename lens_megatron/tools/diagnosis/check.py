"""Defines the result of a check."""

from dataclasses import dataclass
from enum import StrEnum


class CheckStatus(StrEnum):
    """Says whether training would start, and run well."""

    OK = "ok"
    WARN = "warn"
    """Training starts; something is slower or other than it could be."""
    FAIL = "fail"
    """Training does not start, or not well."""
    SKIPPED = "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """Says what was looked at, what was found, and what to do.

    Example: Check("disk", CheckStatus.WARN, "40.0 GB free, 3 checkpoints take 120.0", "set run.directory").
    """

    name: str
    status: CheckStatus
    found: str
    remedy: str = ""
    """What the user should do; empty where the check is ok."""
