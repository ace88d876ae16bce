"""Grading in persistent worker processes, with a hard deadline per answer, kill and respawn.

The deadline runs from the start of an answer's grading, so a long queue times nobody out. A worker that overruns it is
killed (a C-level computation listens to nothing else) and replaced; the others go on meanwhile. A worker holds a few
answers at a time, so that it is never idle between two looks of the trainer; it works on the first, and if it dies,
the others go back to the queue.
"""

import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lens_megatron.reward.boxed import excerpt
from lens_megatron.reward.registry import check_name
from lens_megatron.reward.types import Grade, GradeStatus
from lens_megatron.reward.worker import encode_frame, split_frames

START_TIMEOUT_S = 120.0
MAX_FAILED_STARTS = 3
ANSWERS_PER_WORKER = 16
ROOT = Path(__file__).resolve().parents[2]


class GraderStartError(RuntimeError):
    """No worker could be started; the message holds the reason."""


@dataclass(frozen=True, slots=True)
class _Task:
    ticket: int
    frame: bytes


class _Worker:
    """One process and the answers it holds, the first of which it is grading."""

    def __init__(self, grader: str):
        paths = [str(ROOT), *(p for p in sys.path if p)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lens_megatron.reward.worker", grader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        for stream in (self.process.stdin, self.process.stdout):
            os.set_blocking(stream.fileno(), False)
        self.ready = False
        self.tasks: deque[_Task] = deque()
        self.started = time.monotonic()
        self.inbox = self.outbox = b""

    def assign(self, task: _Task) -> None:
        if not self.tasks:
            self.started = time.monotonic()
        self.tasks.append(task)
        self.outbox += task.frame
        self.flush()

    def flush(self) -> None:
        """Writes what the pipe takes; a worker that stopped reading must not stop the trainer."""
        try:
            while self.outbox:
                self.outbox = self.outbox[os.write(self.process.stdin.fileno(), self.outbox) :]
        except BlockingIOError:
            pass
        except OSError:
            self.outbox = b""  # it died, which its closed output tells

    def receive(self) -> tuple[list[dict], bool]:
        """(whole frames, whether the process has closed its output)."""
        closed = False
        try:
            while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
                self.inbox += chunk
            closed = True
        except BlockingIOError:
            pass
        frames, self.inbox = split_frames(self.inbox)
        return frames, closed

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:
                pass  # bytes that it never read


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


class GraderPool:
    """`workers` processes that grade; tickets in, grades out. Not thread-safe.

    Raises ValueError for an unknown grader or a bound out of range, GraderStartError (from `poll`, `wait`) when workers
    cannot start.
    """

    def __init__(self, workers: int, timeout_s: float, grader: str = "math_verify"):
        if workers < 1:
            raise ValueError(f"workers {workers}; give at least 1")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s {timeout_s}; give a positive number of seconds")
        check_name(grader)
        self.timeout_s, self.grader = timeout_s, grader
        self._queue: deque[_Task] = deque()
        self._done: dict[int, Grade] = {}
        self._tickets = self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)
        self._workers += [_Worker(grader) for _ in range(workers)]

    def submit(self, completion: str, answer: str, *, meta: dict | None = None) -> int:
        """Queues one completion; returns its ticket."""
        if not self._finalizer.alive:
            raise RuntimeError("the pool is closed")
        text = excerpt(completion) if self.grader == "math_verify" else completion
        frame = encode_frame({"completion": text, "answer": answer, "meta": meta or {}})
        self._tickets += 1
        self._queue.append(_Task(self._tickets, frame))
        self._dispatch()
        return self._tickets

    def wait_ready(self) -> None:
        """Blocks until every worker has loaded the grader. Raises GraderStartError when one cannot."""
        while not all(worker.ready for worker in self._workers):
            self._advance(self._next_deadline(), starting=True)

    def poll(self) -> list[tuple[int, Grade]]:
        """Grades that are there and were not yet taken. Does not block."""
        self._advance(0.0)
        taken, self._done = list(self._done.items()), {}
        return taken

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]:
        """Blocks until all of `tickets` are graded, and takes them."""
        missing = [t for t in tickets if t not in self._done]
        if missing:
            self._advance(0.0)
        while any(ticket not in self._done for ticket in missing):
            known = {task.ticket for worker in self._workers for task in worker.tasks}
            known |= {task.ticket for task in self._queue} | set(self._done)
            if unknown := set(missing) - known:
                raise KeyError(f"tickets {sorted(unknown)} were never given out or were taken already")
            self._advance(self._next_deadline())
        return {ticket: self._done.pop(ticket) for ticket in tickets}

    def close(self) -> None:
        """Kills the workers. Idempotent; also happens when the pool is collected or the program ends."""
        self._finalizer()

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_deadline(self) -> float:
        busy = [w.started + (self.timeout_s if w.ready else START_TIMEOUT_S) for w in self._workers]
        return max(0.0, min(busy) - time.monotonic()) if busy else 0.0

    def _advance(self, timeout: float, *, starting: bool = False) -> None:
        """Reads what workers sent, waiting up to `timeout` for the first of it; kills the late; hands out the queue."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ)
                if worker.outbox:
                    selector.register(worker.process.stdin, selectors.EVENT_WRITE)
            busy = starting or self._queue or any(w.tasks for w in self._workers)
            selector.select(timeout if busy else 0)
        for worker in list(self._workers):
            worker.flush()
            self._receive(worker)
        self._dispatch()

    def _receive(self, worker: _Worker) -> None:
        frames, closed = worker.receive()
        for frame in frames:
            if "ready" in frame:
                self._started(worker, frame)
                continue
            task = worker.tasks.popleft()
            worker.started = time.monotonic()
            grade = Grade(
                GradeStatus(frame["status"]), frame["score"], frame["seconds"], frame["extracted"], frame["detail"]
            )
            self._done[task.ticket] = grade
        age = time.monotonic() - worker.started
        if closed:
            self._replace(worker, GradeStatus.CRASH, "the grading process died")
        elif worker.ready and worker.tasks and age > self.timeout_s:
            self._replace(worker, GradeStatus.TIMEOUT, f"longer than {self.timeout_s} s")
        elif not worker.ready and age > START_TIMEOUT_S:
            raise GraderStartError(f"a grading process was not ready after {START_TIMEOUT_S:.0f} s")

    def _started(self, worker: _Worker, frame: dict) -> None:
        if not frame["ready"]:
            self.close()
            raise GraderStartError(f"reward.grader {self.grader}: cannot be loaded: {frame['why']}")
        worker.ready, worker.started, self._failed_starts = True, time.monotonic(), 0

    def _replace(self, worker: _Worker, status: GradeStatus, why: str) -> None:
        """Blames the first answer of the worker, puts the others back in order, starts a new process."""
        worker.kill()
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self.close()
                raise GraderStartError(f"{MAX_FAILED_STARTS} grading processes died before they were ready")
        elif worker.tasks:
            task = worker.tasks.popleft()
            self._done[task.ticket] = Grade(status, 0.0, time.monotonic() - worker.started, None, why)
        self._queue.extendleft(reversed(worker.tasks))
        self._workers.append(_Worker(self.grader))

    def _dispatch(self) -> None:
        """The least loaded ready worker gets the next answer; nobody holds more than ANSWERS_PER_WORKER."""
        while self._queue:
            ready = [w for w in self._workers if w.ready and len(w.tasks) < ANSWERS_PER_WORKER]
            if not ready:
                return
            min(ready, key=lambda w: len(w.tasks)).assign(self._queue.popleft())


def grade(
    completions: Sequence[str],
    answers: Sequence[str],
    timeout_s: float = 5.0,
    *,
    workers: int | None = None,
    grader: str = "math_verify",
) -> list[Grade]:
    """Grades `completions[i]` against `answers[i]`, in order, in processes of their own.

    Args:
        timeout_s: wall-clock limit of one answer, from the start of its grading.
        workers: processes; as many as cores by default.

    Raises:
        ValueError: lengths differ, bad bound, unknown grader. GraderStartError: the grader cannot be loaded.
    """
    if len(completions) != len(answers):
        raise ValueError(f"{len(completions)} completions for {len(answers)} answers; give one answer per completion")
    if not completions:
        return []
    count = workers if workers is not None else min(len(completions), os.cpu_count() or 1)
    with GraderPool(count, timeout_s, grader) as pool:
        tickets = [pool.submit(c, a) for c, a in zip(completions, answers, strict=True)]
        grades = pool.wait(tickets)
    return [grades[ticket] for ticket in tickets]
