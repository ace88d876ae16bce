"""Seconds per named phase of a step, and where this rank stands now."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a rank stands. Replaced as a whole, so that another thread never reads half of it."""

    step: int = 0
    phase: str = "between phases"
    """The innermost one."""
    since: float = field(default_factory=time.monotonic)
    """`time.monotonic()` when a phase was last entered or left."""
    changes: int = 0
    """Phases entered and left so far: the same on every rank that is equally far."""


@dataclass(slots=True)
class Clock:
    """`with clock("gen"): ...` adds to that phase; `take()` reads all phases and starts afresh."""

    seconds: dict[str, float] = field(default_factory=dict)
    step: int = 0
    """The step that the phases belong to; set by the loop."""
    moment: Moment = field(default_factory=Moment)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, outer = time.perf_counter(), self.moment.phase
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
        self.moment = Moment(self.step, phase, time.monotonic(), self.moment.changes + 1)
