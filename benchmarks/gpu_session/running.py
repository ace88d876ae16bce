"""Runs a case's command below a supervisor, with its output in a file."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import getpid
from pathlib import Path

from benchmarks.gpu_session import supervise

ROOT = Path(__file__).resolve().parents[2]
_SUPERVISOR_S = supervise.GRACE_S + 20
"""What the supervisor itself may take beyond the limit, to end what is left."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    status: int
    """The exit status as a shell reports it."""
    seconds: float
    log: str

    @property
    def timed_out(self) -> bool:
        return self.status == supervise.TIMED_OUT


def run(command: Sequence[str], *, limit_s: float, log: Path, environment: Mapping[str, str]) -> Ended:
    """Runs `command` in the project's folder for at most `limit_s` seconds; nothing that it started is left after.

    Both of its outputs go to the file `log`. Raises OSError if that cannot be written.
    """
    arguments = [sys.executable, "-m", "benchmarks.gpu_session.supervise", str(limit_s), str(getpid()), *command]
    start = time.monotonic()
    with log.open("wb") as file:
        started = subprocess.Popen(
            arguments, cwd=ROOT, env=dict(environment), stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = started.wait(limit_s + _SUPERVISOR_S)
        except subprocess.TimeoutExpired:
            started.kill()
            status = supervise.TIMED_OUT
        except BaseException:
            started.terminate()
            raise
    seconds = time.monotonic() - start
    return Ended(128 - status if status < 0 else status, seconds, log.read_text(errors="replace"))
