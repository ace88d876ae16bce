"""Bounds of grading that the configuration and `GraderPool` share."""

MAX_TIMEOUT_S = 86_400.0
"""Seconds that the grading of one answer may be allowed: a day."""
PROCESSES_PER_CORE = 16
"""They mostly wait for answers, but each takes memory, and a machine that starts thousands stands still."""


def most_processes(cores: int, ranks: int = 1) -> int:
    """Grading processes that a machine with `cores` cores may run, all ranks together.

    Every one of the machine's `ranks` may have one, however few the cores are.
    """
    return max(ranks, PROCESSES_PER_CORE * cores)
