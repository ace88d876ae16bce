"""Runs one command with a limit of time, and ends every process that it started, however it ends.

    python -m benchmarks.gpu_session.supervise SECONDS PARENT COMMAND ...

torchrun gives its workers sessions of their own, so that killing a process group would leave them on the GPU. This
process becomes the one that inherits orphans, so that all that the command started stays below it in the process tree.
It ends them too when it is told to stop, and when its own parent, whose process id is PARENT, is killed.

Exit status: that of the command, as a shell reports it; 124 if it took too long.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

TIMED_OUT = 124
GRACE_S = 5.0
"""What a command has after SIGTERM to write down how far it came."""
_GIVE_UP_S = 10.0
"""A process that waits for the driver cannot be killed; after this time it is left behind and named."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class _ToldToStop(Exception):
    """SIGTERM has come, or the parent is gone."""


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    limit, parent, command = float(arguments[0]), int(arguments[1]), arguments[2:]
    _inherit_orphans()
    signal.signal(signal.SIGTERM, _stop)
    started: subprocess.Popen | None = None
    try:
        _die_with(parent)
        started = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        status = started.wait(limit)
        return 128 - status if status < 0 else status
    except subprocess.TimeoutExpired:
        print(f"\nstopped: it took longer than {limit:.0f} s", file=sys.stderr, flush=True)
        return TIMED_OUT
    except _ToldToStop:
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if started is not None and started.returncode is None:
            _ask_to_end(started)
        left = end_all_below(os.getpid())
        if left:
            print(f"processes that cannot be ended: {left}", file=sys.stderr, flush=True)


def _stop(*_: object) -> None:
    raise _ToldToStop


def _inherit_orphans() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _die_with(parent: int) -> None:
    """Asks for SIGTERM when the parent dies. Raises _ToldToStop if it died before this could be asked for."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise _ToldToStop


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl, which Linux has since 3.4, is refused here")


def _ask_to_end(started: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(GRACE_S)


def end_all_below(pid: int) -> list[int]:
    """Kills all processes below `pid` until there are none; returns those that do not end within ten seconds."""
    deadline = time.monotonic() + _GIVE_UP_S
    while found := descendants(pid, _parents()):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return found
        time.sleep(0.01)
        _reap()
    return []


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(pid: int, parents: dict[int, int]) -> list[int]:
    """Returns all processes below `pid`, given every process's parent."""
    children: dict[int, list[int]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _parents() -> dict[int, int]:
    return dict(_stat_lines(Path("/proc").glob("[0-9]*/stat")))


def _stat_lines(paths: Iterable[Path]) -> Iterable[tuple[int, int]]:
    """Yields (process, parent); a command's name in a stat line may hold spaces and brackets itself."""
    for path in paths:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
