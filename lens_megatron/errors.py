"""Exit codes of the project's processes, and the base class of errors of which the user sees only the message.

The module imports only the standard library, because every grading process loads it at its start.
"""

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """The exit code of a training process. torchrun reports it per rank; its own is 1 if that of any rank is not 0."""

    DONE = 0
    """All steps are done, or the run was stopped as asked."""
    CRASH = 1
    """An unexpected exception was raised; the traceback is on stderr."""
    MISTAKE = 2
    """Configuration, data, model, folder, checkpoint or engine cannot be used; the message names the remedy."""
    ENGINES_LOST = 69
    """No engine is left to sample with; graded rollouts are kept for a restart. EX_UNAVAILABLE."""
    NON_FINITE = 70
    """`train.max_skipped_updates` updates in a row had a loss or gradient that was not finite. EX_SOFTWARE."""
    HANG = 75
    """A phase lasted longer than `run.phase_timeout_minutes`: trying again may help. EX_TEMPFAIL."""


class UserError(Exception):
    """Ends the run with its message instead of a traceback. The message names the thing, its values and the remedy.

    It is no ValueError or RuntimeError, so that code which catches those of a library does not catch it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.MISTAKE
