"""Sampling on a thread, while the process trains."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from lens_megatron.types import CollectedGroups


class BackgroundSampling:
    """At most one step's sampling, under way on a thread or finished and not taken yet."""

    def __init__(self):
        self.step, self.sampled = 0, Future()
        self.sampled.set_result(CollectedGroups([]))

    def begin(self, step: int, sample: Callable[[], CollectedGroups]) -> None:
        self.step, self.sampled = step, Future()
        # A daemon: a run that is stopped does not wait for it. What it has graded is kept for the next attempt.
        threading.Thread(target=_fulfil, args=(self.sampled, sample), name="sampling", daemon=True).start()

    def take(self) -> CollectedGroups:
        """Waits. Raises what sampling has raised."""
        return self.sampled.result()

    def settle(self) -> None:
        """Waits until the engine is free."""
        self.sampled.exception()


def _fulfil(sampled: Future, sample: Callable[[], CollectedGroups]) -> None:
    try:
        sampled.set_result(sample())
    except BaseException as error:  # raised again by `take`
        sampled.set_exception(error)
