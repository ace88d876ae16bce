"""Measures a round: seconds of its phases, the busy time of a pipeline stage, the peak of memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from lens_megatron.policy import forward, optimizer_step
from lens_megatron.supervision.clock import Clock


@dataclass(slots=True)
class PhaseClock(Clock):
    """The trainer's clock, which also counts CPU seconds, and waits for a GPU to finish before it reads."""

    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            self.cpu_seconds[phase] = self.cpu_seconds.get(phase, 0.0) + time.process_time() - cpu


class StageProbe:
    """Times this rank's stage in its own forward and backward steps, and in whole pipelined runs.

    It wraps functions of Megatron-Core's schedules by name, in this process. On a GPU each step is waited for, which
    takes away overlap: rounds with the probe are not those whose seconds are reported.
    """

    def __init__(self):
        self.busy: dict[str, float] = {}
        self.whole: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        """Forward steps of this stage: micro-batches x model chunks."""
        self.phase = ""

    @contextmanager
    def attached(self) -> Iterator[None]:
        kept = schedules.forward_step, schedules.backward_step, forward.run_pipeline
        schedules.forward_step = self._timed(self._counted(schedules.forward_step), lambda: self.busy)
        schedules.backward_step = self._timed(schedules.backward_step, lambda: self.busy)
        forward.run_pipeline = self._run("ref", kept[2])
        optimizer_step.run_pipeline = self._run("update_actor", kept[2])
        try:
            yield
        finally:
            schedules.forward_step, schedules.backward_step = kept[:2]
            forward.run_pipeline = optimizer_step.run_pipeline = kept[2]

    def idle_share(self) -> dict[str, float]:
        """Returns for each phase the share of the pipelined run in which this stage computed nothing."""
        return {phase: 1 - self.busy.get(phase, 0.0) / whole for phase, whole in self.whole.items()}

    def _counted(self, function: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.steps[self.phase] = self.steps.get(self.phase, 0) + 1
            return function(*args, **kwargs)

        return counted

    def _run(self, phase: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.phase = phase
            return self._timed(function, lambda: self.whole)(*args, **kwargs)

        return run

    def _timed(self, function: Callable, into: Callable[[], dict[str, float]]) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            totals = into()
            totals[self.phase] = totals.get(self.phase, 0.0) + time.perf_counter() - start
            return result

        return timed
