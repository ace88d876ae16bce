"""The trainer's end of one grading process, with its pipes and the answers it holds."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lens_megatron.reward import frames
from lens_megatron.reward.registry import GraderSet

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 5.0
"""Seconds within which a keeper must end the processes below it, before its process group is killed."""


@dataclass(slots=True)
class Task:
    """An answer, which is graded once for all tickets with the same one."""

    tickets: list[int]
    frame: bytes
    pair: tuple[str, str] | None
    """The (answer, expected answer) that alone decide the verdict; None where more than these decide it."""
    losses: int = 0
    """The number of processes that were lost while they graded it."""


class GradingProcess:
    """A grading process and the answers that it holds, of which it is grading the first."""

    def __init__(self, graders: GraderSet):
        """Raises OSError when the system starts no more processes."""
        paths = [str(ROOT), *(p for p in sys.path if p)]
        self.keeper = subprocess.Popen(
            [sys.executable, "-m", "lens_megatron.reward.keeper", str(os.getpid()), graders.to_argument()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the trainer; a process group can be killed as a whole
        )
        self.input, self.output = _pipes(self.keeper)
        self.pid: int | None = None
        """The id of the grading process, which is known once it is ready."""
        self.tasks: deque[Task] = deque()
        self.started = time.monotonic()
        self.inbox = self.outbox = b""

    @property
    def ready(self) -> bool:
        return self.pid is not None

    def assign(self, task: Task) -> None:
        """Gives the process one more answer. If it had none, the time of this answer begins."""
        if not self.tasks:
            self.started = time.monotonic()
        self.tasks.append(task)
        self.outbox += task.frame
        self.flush()

    def flush(self) -> None:
        """Writes as much as the pipe accepts; a process that stopped reading must not stop the trainer."""
        try:
            while self.outbox:
                self.outbox = self.outbox[os.write(self.input.fileno(), self.outbox) :]
        except BlockingIOError:
            pass
        except OSError:
            self.outbox = b""  # it died, which `receive` and `has_died` report

    def receive(self) -> tuple[list[bytes], bool]:
        """Returns the bodies of the whole frames that have arrived, and whether the process has closed its output."""
        closed = False
        try:
            while chunk := os.read(self.output.fileno(), 1 << 16):
                self.inbox += chunk
            closed = True
        except BlockingIOError:
            pass
        bodies, self.inbox = frames.split(self.inbox)
        return bodies, closed

    def has_died(self) -> bool:
        """Returns whether the keeper has ended, as it does after the grading process. As a zombie it keeps its id."""
        try:
            return os.waitid(os.P_PID, self.keeper.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def is_stopped(self) -> bool:
        """Returns whether a signal (SIGSTOP) has stopped the grading process, so that it cannot grade."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
        except OSError:
            return False


def end(processes: Sequence[GradingProcess]) -> None:
    """Ends the processes and all that their graders have started, and waits until they are gone."""
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGCONT):  # SIGCONT lets a stopped keeper handle SIGTERM
            _signal(os.kill, process.keeper.pid, number)
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        while not process.has_died() and time.monotonic() < deadline:
            time.sleep(0.002)
        _signal(os.killpg, process.keeper.pid, signal.SIGKILL)  # ends what a killed keeper has left
        process.keeper.wait()
        for stream in (process.input, process.output):
            try:
                stream.close()
            except OSError:
                pass  # the process never read these bytes


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Returns this process's ends of the pipes to its input and from its output. Neither blocks."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process was started without pipes")
    for stream in (process.stdin, process.stdout):
        os.set_blocking(stream.fileno(), False)
    return process.stdin, process.stdout


def _signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        send(target, number)
    except ProcessLookupError:
        pass  # the process has ended
