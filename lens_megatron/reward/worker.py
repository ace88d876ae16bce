"""The worker process, which reads submissions from standard input and writes grades to its output (frames.py).

The keeper (keeper.py) forks this process and ends it.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

from lens_megatron.reward import frames, registry
from lens_megatron.reward.types import Grade, GradeStatus, Submission, Verdict

MEMORY_BYTES = 2 << 30
"""Bytes of address space that a grading process may add after its start. One that needs more counts as crashed."""


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)


def main(graders: str) -> None:
    """Grades until standard input ends, with the graders of `GraderSet.to_argument`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    own = os.getpid()
    frames_in, frames_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a grader prints must not look like a frame, and a program that it starts must not read our frames.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        grader = registry.load(registry.GraderSet.from_argument(graders))
        if sys.platform == "linux":
            _limit_memory()
    except (Exception, SystemExit) as error:  # the trainer shows whatever a user's module raises
        _send(frames_out, frames.Started(own, f"{type(error).__name__}: {error}"))
        return
    _send(frames_out, frames.Started(own))
    while (body := frames.read(frames_in)) is not None:
        grade = _grade(grader, frames.decode_submission(body))
        if os.getpid() != own:
            os._exit(1)  # a process forked by the grader came back from it
        _send(frames_out, grade)


def _send(stream: BinaryIO, content: frames.Started | Grade) -> None:
    stream.write(frames.encode(content))
    stream.flush()


def _grade(grader: Callable[[Submission], Verdict], submission: Submission) -> Grade:
    start = time.monotonic()
    try:
        found = grader(submission)
    except (Exception, SystemExit) as error:  # a grader's failure is a status of the sample, not of the run
        found = Verdict(GradeStatus.CRASH, 0.0, None, f"{type(error).__name__}: {error}"[:500])
    return Grade(found.status, found.score, time.monotonic() - start, found.extracted, found.detail)
