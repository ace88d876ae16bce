"""Grades in persistent processes with a hard deadline per answer; a process that misses it is killed and replaced.

The deadline runs from the start of an answer's grading, so no answer times out in a long queue. Only a kill stops a
C-level computation; the other processes go on meanwhile. A process holds a few answers at a time, so that it is never
idle between two polls of the trainer; it grades the first, and if it dies, the others go back to the queue.

An answer whose process died is graded once more before it counts as a crash: the cause may lie outside of the process.
Where a verdict depends only on an answer and the expected answer, equal pairs are graded once.
"""

import os
import selectors
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import replace

from lens_megatron.errors import UserError
from lens_megatron.reward import frames, registry
from lens_megatron.reward.boxed import excerpt, last_box
from lens_megatron.reward.limits import MAX_TIMEOUT_S, PROCESSES_PER_CORE, most_processes
from lens_megatron.reward.process import GradingProcess, Task, end
from lens_megatron.reward.types import AnswerFacts, Grade, GradeStatus, Submission

START_TIMEOUT_S = 120.0
MAX_FAILED_STARTS = 3
ANSWERS_PER_WORKER = 16
CACHED_VERDICTS = 4096
LOOK_S = 0.5
"""Seconds between two checks that processes live, while nothing arrives from them."""


class GraderStartError(UserError):
    """No worker could be started; the message gives the reason."""


class GraderPool:
    """Grades in `workers` processes: `submit` returns tickets, `poll` and `wait` their grades. Threads may share it.

    After the first loss of a process a spare one is kept ready, so that further losses do not wait for a start.

    Several graders share the time limit of an answer; their scores are added with `weights`, which are 1 by default.

    Raises ValueError for an unknown grader, wrong weights or a bound out of range, GraderStartError (from `poll`,
    `wait` too) when workers cannot start.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        grader: str | Sequence[str] = "math_verify",
        weights: Sequence[float] = (),
    ):
        cores = os.cpu_count() or 1
        if not 1 <= workers <= most_processes(cores):
            raise ValueError(
                f"reward.workers_per_rank {workers}: give at least 1 and, on this machine, at most "
                f"{most_processes(cores)} ({PROCESSES_PER_CORE} for each of its {cores} cores)"
            )
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"reward.timeout_s {timeout_s}: give more than 0 and at most {MAX_TIMEOUT_S:g} seconds")
        self.graders = registry.choose(grader, weights)
        self.workers, self.timeout_s = workers, timeout_s
        self._lock = threading.Lock()
        self._queue: deque[Task] = deque()
        self._under_way: dict[tuple[str, str], Task] = {}
        self._verdicts: OrderedDict[tuple[str, str], Grade] = OrderedDict()
        self._open: set[int] = set()
        self._done: dict[int, Grade] = {}
        self._tickets = self._failed_starts = 0
        self._looked = time.monotonic()
        self._processes: list[GradingProcess] = []
        self._finalizer = weakref.finalize(self, _end_all, self._processes)
        self._start(workers)

    def submit(self, completion: str, answer: str, *, facts: AnswerFacts | None = None) -> int:
        """Queues one completion; returns its ticket. `facts` are for graders other than math_verify alone."""
        text, pair = completion, None
        if self.graders.only_math_verify:
            text, facts = excerpt(completion), None
            box, _ = last_box(text)
            pair = None if box is None else (box, answer)
        with self._lock:
            self._check_open()
            self._tickets += 1
            ticket = self._tickets
            if pair is not None and pair in self._verdicts:
                self._verdicts.move_to_end(pair)
                self._done[ticket] = self._verdicts[pair]
                return ticket
            self._open.add(ticket)
            if pair is not None and pair in self._under_way:
                self._under_way[pair].tickets.append(ticket)
                return ticket
            task = Task([ticket], frames.encode(Submission(text, answer, facts or AnswerFacts())), pair)
            if pair is not None:
                self._under_way[pair] = task
            self._queue.append(task)
            self._dispatch()
        return ticket

    def wait_ready(self) -> None:
        """Blocks until every worker has loaded the grader. Raises GraderStartError when one cannot."""
        while not all(process.ready for process in list(self._processes)):
            self._advance(LOOK_S)

    def poll(self) -> list[tuple[int, Grade]]:
        """Takes the available grades with their tickets. Does not block."""
        self._advance(0.0)
        with self._lock:
            taken = list(self._done.items())
            self._done.clear()
        return taken

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]:
        """Blocks until all of `tickets` are graded, and takes them. Raises KeyError for an unknown or taken ticket."""
        for ticket in tickets:
            while ticket not in self._done:
                if ticket not in self._open and ticket not in self._done:
                    raise KeyError(f"ticket {ticket} was never given out or was taken already")
                self._advance(LOOK_S)
        with self._lock:
            return {ticket: self._done.pop(ticket) for ticket in tickets}

    def close(self) -> None:
        """Ends all processes, as collecting the pool or ending the program does. It is idempotent."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the pool is closed")

    def _start(self, count: int) -> None:
        """Brings the number of processes up to `count`."""
        try:
            while len(self._processes) < count:
                self._processes.append(GradingProcess(self.graders))
        except OSError as error:
            self._finalizer()
            raise GraderStartError(
                f"grading process {len(self._processes) + 1} of {count} could not be started: {error}; "
                "lower reward.workers_per_rank"
            ) from error

    def _advance(self, timeout: float) -> None:
        """Reads messages of workers, waits up to `timeout` for the first, kills late workers and assigns the queue."""
        with selectors.DefaultSelector() as selector:
            with self._lock:
                self._check_open()
                timeout = min(timeout, self._until_next_deadline())
                for process in self._processes:
                    selector.register(process.output, selectors.EVENT_READ)
                    if process.outbox:
                        selector.register(process.input, selectors.EVENT_WRITE)
            selector.select(timeout)  # without the lock, so that another thread can submit or close
        with self._lock:
            self._check_open()
            unwatched, self._looked = time.monotonic() - self._looked, time.monotonic()
            for process in list(self._processes):
                process.flush()
                self._look_after(process, unwatched)
            self._dispatch()

    def _until_next_deadline(self) -> float:
        limits = [p.started + self.timeout_s for p in self._processes if p.ready and p.tasks]
        return max(0.0, min(limits, default=float("inf")) - time.monotonic())

    def _look_after(self, process: GradingProcess, unwatched: float) -> None:
        """Takes a process's verdicts; replaces it if lost or late. `unwatched` is the seconds since the last check."""
        bodies, closed = process.receive()
        for body in bodies:
            if not process.ready:
                self._greeted(process, frames.decode_started(body))
                continue
            task = process.tasks.popleft()
            process.started = time.monotonic()
            self._finish(task, replace(frames.decode_grade(body), regraded=task.losses > 0))
        age = time.monotonic() - process.started
        if closed or process.has_died():
            self._replace(process, GradeStatus.CRASH, "the grading process died", again=True)
        elif not process.ready and age > START_TIMEOUT_S + unwatched:
            self._replace(process, GradeStatus.CRASH, f"was not ready after {START_TIMEOUT_S:.0f} s", again=True)
        elif process.ready and process.tasks and age > self.timeout_s:
            if unwatched > self.timeout_s:
                process.started = time.monotonic()  # the job may have been suspended, and this process with it
                return
            late = f"longer than {self.timeout_s} s"
            self._replace(process, GradeStatus.TIMEOUT, late, again=process.is_stopped())

    def _greeted(self, process: GradingProcess, started: frames.Started) -> None:
        if started.why_not:
            self._finalizer()
            names = ", ".join(self.graders.names)
            raise GraderStartError(f"reward.grader {names}: cannot be loaded: {started.why_not}")
        process.pid, process.started, self._failed_starts = started.pid, time.monotonic(), 0

    def _replace(self, process: GradingProcess, status: GradeStatus, why: str, *, again: bool) -> None:
        """Replaces the process. Its first answer fails unless it may be graded `again`; the others go back in order."""
        self._processes.remove(process)
        end([process])
        if not process.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._finalizer()
                raise GraderStartError(f"{MAX_FAILED_STARTS} grading processes in a row died or hung as they started")
        if process.tasks:
            first = process.tasks[0]
            first.losses += 1
            if not again or first.losses > 1:
                process.tasks.popleft()
                seconds = time.monotonic() - process.started
                self._finish(first, Grade(status, 0.0, seconds, None, why, first.losses > 1))
        self._queue.extendleft(reversed(process.tasks))
        self._start(self.workers + 1)

    def _finish(self, task: Task, grade: Grade) -> None:
        self._done.update(dict.fromkeys(task.tickets, grade))
        self._open.difference_update(task.tickets)  # comes last, because threads wait without the lock
        if task.pair is not None:
            del self._under_way[task.pair]
            if grade.status is not GradeStatus.CRASH:
                self._verdicts[task.pair] = grade
                if len(self._verdicts) > CACHED_VERDICTS:
                    self._verdicts.popitem(last=False)

    def _dispatch(self) -> None:
        """Gives the next answers to the processes that hold fewest; at most `workers` processes get any."""
        while self._queue:
            ready = [p for p in self._processes if p.ready]
            if sum(bool(p.tasks) for p in ready) >= self.workers:
                ready = [p for p in ready if p.tasks]
            ready = [p for p in ready if len(p.tasks) < ANSWERS_PER_WORKER and not p.has_died()]
            if not ready:
                return
            min(ready, key=lambda p: len(p.tasks)).assign(self._queue.popleft())


def _end_all(processes: list[GradingProcess]) -> None:
    end(processes)
    processes.clear()


def grade(
    completions: Sequence[str],
    answers: Sequence[str],
    timeout_s: float = 5.0,
    *,
    workers: int | None = None,
    grader: str | Sequence[str] = "math_verify",
    weights: Sequence[float] = (),
    facts: Sequence[AnswerFacts] = (),
) -> list[Grade]:
    """Grades `completions[i]` against `answers[i]`, in order, in processes of their own.

    Args:
        timeout_s: wall-clock limit of one answer, from the start of its grading.
        workers: number of processes; by default the number of cores.
        grader, weights: one grader, or several whose weighted scores are added.
        facts: what graders other than math_verify are told of each completion; nothing if there are none.

    Raises:
        ValueError: lengths differ, a bound or a weight is invalid, or a grader is unknown.
        GraderStartError: the grader cannot be loaded.
    """
    if len(completions) != len(answers):
        raise ValueError(f"{len(completions)} completions for {len(answers)} answers; give one answer per completion")
    if facts and len(facts) != len(completions):
        raise ValueError(f"{len(completions)} completions for {len(facts)} facts; give one per completion, or none")
    if not completions:
        return []
    count = workers if workers is not None else min(len(completions), os.cpu_count() or 1)
    told = facts or [AnswerFacts()] * len(completions)
    with GraderPool(count, timeout_s, grader, weights) as pool:
        tickets = [pool.submit(c, a, facts=f) for c, a, f in zip(completions, answers, told, strict=True)]
        grades = pool.wait(tickets)
    return [grades[ticket] for ticket in tickets]
