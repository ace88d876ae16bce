"""Exit codes of a training process. torchrun reports them per rank; its own is 1 whenever a rank's is not 0."""

DONE = 0
"""All steps done, or stopped as asked."""
CRASH = 1
"""An exception nobody expected; the traceback is on stderr."""
MISTAKE = 2
"""Configuration, data, model, folder, checkpoint or engine cannot be used; the message names the remedy."""
ENGINES_LOST = 69
"""No engine is left to sample with; what was graded is kept for a restart. EX_UNAVAILABLE."""
NON_FINITE = 70
"""`train.max_skipped_updates` updates in a row had a loss or gradient that was not finite. EX_SOFTWARE."""
HANG = 75
"""A phase outlasted `run.phase_timeout_minutes`: trying again may help. EX_TEMPFAIL."""
