"""What a call of the scheduler did and how long it took: live, for a display, and at its end, for the metrics.

Clocks are read here and nowhere else in sampling, and nothing that is sampled depends on them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from lens_megatron.rollout.engine import EngineProgress
from lens_megatron.types import Origin, SamplingStats


@dataclass(frozen=True, slots=True)
class SamplingProgress:
    """How far a call of `RolloutScheduler.sample` has come. It counts this rank's rollouts of both waves."""

    finished: int
    total: int
    """Rollouts queued so far, less those cancelled: it changes while groups turn out to be hard or not."""
    running: int
    waiting: int
    """Rollouts in the scheduler's queue or in the engine's."""
    second_wave: int
    """Those of `total` that belong to second waves."""
    tokens_per_second: float
    """Tokens that this engine has generated since the call began, divided by the seconds since then."""


class ProgressDisplay(Protocol):
    """Shows the user how far the sampling of a step has come. `output.progress_bar` has one for terminals."""

    def begin(self, step: int) -> None:
        """The sampling of `step` begins."""

    def show(self, progress: SamplingProgress) -> None:
        """It is called after every step of the engine, between `begin` and `end`."""

    def end(self) -> None:
        """The sampling is over, or was given up because of an error."""


class NoDisplay:
    """Implements `ProgressDisplay` for ranks that show nothing."""

    def begin(self, step: int) -> None:
        pass

    def show(self, progress: SamplingProgress) -> None:
        pass

    def end(self) -> None:
        pass


class SamplingRecorder:
    """Counts and times what one call of `RolloutScheduler.sample` does."""

    def __init__(self, tokens_before: int):
        """`tokens_before`: the number of tokens that the engine had generated before the call."""
        self.tokens_before, self.start = tokens_before, time.perf_counter()
        self.ended = dict.fromkeys(Origin, self.start)
        self.total = dict.fromkeys(Origin, 0)
        self.engine_seconds, self.finished, self.early_decisions, self.discarded_tokens = 0.0, 0, 0, 0
        self.regraded = 0

    def queued(self, origin: Origin, rollouts: int) -> None:
        self.total[origin] += rollouts

    def completed(self, origin: Origin) -> None:
        self.finished += 1
        self.ended[origin] = time.perf_counter()

    def cancelled(self, unfinished: int, tokens: int) -> None:
        """A second wave was cancelled, `unfinished` rollouts of which had not ended; the others had `tokens` tokens."""
        self.total[Origin.PURIFIED] -= unfinished
        self.discarded_tokens += tokens

    @contextmanager
    def engine_step(self) -> Iterator[None]:
        """The engine takes a step within the block."""
        begin = time.perf_counter()
        yield
        self.engine_seconds += time.perf_counter() - begin

    def progress(self, engine: EngineProgress, queued: int) -> SamplingProgress:
        """`queued`: the number of requests that wait in the scheduler's queue."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return SamplingProgress(
            finished=self.finished,
            total=sum(self.total.values()),
            running=engine.running,
            waiting=engine.waiting + queued,
            second_wave=self.total[Origin.PURIFIED],
            tokens_per_second=(engine.generated_tokens - self.tokens_before) / seconds,
        )

    def stats(self, cancelled_tokens: int) -> SamplingStats:
        """`cancelled_tokens`: the number of tokens that this engine generated for requests that were then cancelled."""
        return SamplingStats(
            seconds=time.perf_counter() - self.start,
            engine_seconds=self.engine_seconds,
            second_wave_seconds=max(0.0, self.ended[Origin.PURIFIED] - self.ended[Origin.NATIVE]),
            early_decisions=self.early_decisions,
            discarded_tokens=self.discarded_tokens + cancelled_tokens,
            regraded=self.regraded,
        )
