"""Measures seconds per named phase of a step and seconds in which the process ran, and records the current phase."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class RunTime:
    """A clock that stands still while the process is stopped by a signal or frozen, or its machine is paused.

    Every call of `now` counts the time since the call before, but at most `LONGEST_S` of it. So it must be called more
    often than that, which `ticking` does. Any thread may read it.
    """

    TICK_S = 0.25
    LONGEST_S = 1.0
    """Seconds: longer than a tick on a loaded machine, and short enough for deadlines of seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._seen = 0.0, time.monotonic()

    def now(self) -> float:
        """Returns seconds since an arbitrary start."""
        with self._lock:
            seen = time.monotonic()
            self._seconds += min(seen - self._seen, self.LONGEST_S)
            self._seen = seen
            return self._seconds

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Starts a thread that reads the clock often enough within the block."""
        stopping = threading.Event()

        def tick() -> None:
            while not stopping.wait(self.TICK_S):
                self.now()

        thread = threading.Thread(target=tick, name="run time", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()


@dataclass(frozen=True, slots=True)
class PhasePosition:
    """Says which step and phase a rank is in. It is replaced as a whole, so that no other thread reads half of it."""

    step: int = 0
    phase: str = "between phases"
    """The innermost phase."""
    since: float = 0.0
    """The time by `Clock.run_time` at which a phase was last entered or left."""
    changes: int = 0
    """Number of phases entered and left so far. It is equal on ranks that have come equally far."""


@dataclass(slots=True)
class Clock:
    """Measures phases: `with clock("gen"): ...` adds to that phase; `take()` returns all phases and resets them."""

    seconds: dict[str, float] = field(default_factory=dict)
    step: int = 0
    """The step that the phases belong to, which the training loop sets."""
    run_time: RunTime = field(default_factory=RunTime)
    """The clock by which deadlines are measured."""
    position: PhasePosition = field(default_factory=PhasePosition)

    def seconds_since(self, position: PhasePosition) -> float:
        """Returns the seconds since `position` in which the process ran."""
        return self.run_time.now() - position.since

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, outer = time.perf_counter(), self.position.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken

    def _enter(self, phase: str) -> None:
        self.position = PhasePosition(self.step, phase, self.run_time.now(), self.position.changes + 1)
