"""Defines what a tracker is, and keeps one that fails from ending a run."""

import logging
from collections.abc import Mapping
from typing import Protocol

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A sink that metrics are written to. What it holds is a copy: metrics.jsonl has everything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics of a step. A step may get more of them later, and is done again where a run resumes."""

    def close(self) -> None:
        """Writes what is waiting; the tracker is not used afterwards."""


class GuardedTracker:
    """A tracker whose errors are warnings, the first of each series: a run goes on without its copy of the metrics.

    Args:
        name: what warnings call the tracker.
    """

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker = name, tracker
        self._lost: list[int] = []
        """Steps that could not be written since the last one that was."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self.tracker.log(step, metrics)
        except Exception as error:  # of a library, which may raise anything
            if not self._lost:
                why = f"{type(error).__name__}: {error}"
                logger.warning(f"{self.name} failed at step {step}: {why}; training goes on, metrics.jsonl has it all")
            self._lost.append(step)
            return
        if self._lost:
            logger.info(f"{self.name} works again; it lacks steps {self._lost[0]} to {self._lost[-1]}")
            self._lost.clear()

    def close(self) -> None:
        try:
            self.tracker.close()
        except Exception as error:
            logger.warning(f"{self.name} could not be closed: {type(error).__name__}: {error}; its last steps may lack")
