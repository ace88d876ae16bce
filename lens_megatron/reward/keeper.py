"""Runs one grading process and ends all that it started: `python -m lens_megatron.reward.keeper PARENT_PID GRADERS`.

    trainer ── starts ──► keeper ── forks ──► grading process ── may start ──► processes of a custom grader

Everything below the keeper is killed when the grading process ends, when the trainer asks for it (SIGTERM), and when
the trainer has ended in any way. This needs a process of its own: a killed trainer can no longer end anything, a
grading process may be busy in C code, and Linux's parent-death signal reaches no grandchildren and is sent at the end
of the *thread* that started the child, while the trainer's threads start and end. The keeper has one thread.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from lens_megatron.reward import worker

POLL_S = 0.2
"""Seconds between two checks that the trainer still runs."""

_WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(parent: int, graders: str) -> None:
    """Forks the grading process and waits until it, or the trainer with process id `parent`, has ended."""
    prctl, keeper = ctypes.CDLL(None).prctl, os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)  # processes whose parent has ended become children of this one
    child = os.fork()
    if child == 0:
        try:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            if os.getppid() == keeper:
                worker.main(graders)
        finally:
            os._exit(0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # else the trainer would not see that the grading process has closed its end
        os.dup2(nowhere, descriptor)
    asked = False
    while not asked and os.getppid() == parent and not _reap(child):
        received = signal.sigtimedwait(_WATCHED, POLL_S)
        asked = received is not None and received.si_signo == signal.SIGTERM
    _end_descendants(child)


def _reap(child: int) -> bool:
    """Collects processes that have ended. Returns True once `child` has."""
    ended = False
    while not ended and (pid := os.waitpid(-1, os.WNOHANG)[0]):
        ended = pid == child
    return ended


def _end_descendants(child: int) -> None:
    """Kills one generation after the other: the children of killed processes become children of this one."""
    generation = [child]
    while generation:
        for pid in generation:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass  # it was collected before
        generation = _children()


def _children() -> list[int]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    own = os.getpid()
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _parent(entry) == own]


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None  # it has just ended


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
