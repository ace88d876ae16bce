"""Sets the bounds of grading that the configuration and `GraderPool` share."""

MAX_TIMEOUT_S = 86_400.0
"""The largest limit, in seconds, that the grading of one answer may have: a day."""
PROCESSES_PER_CORE = 16
"""The most grading processes per core. They mostly wait for answers, but thousands would exhaust a machine's memory."""


def most_processes(cores: int, ranks: int = 1) -> int:
    """Returns the number of grading processes that a machine with `cores` cores may run, all ranks together.

    Each of the machine's `ranks` may have one, even with fewer cores.
    """
    return max(ranks, PROCESSES_PER_CORE * cores)
