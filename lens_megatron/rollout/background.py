"""Samples on a thread while the process trains."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from lens_megatron.results import CollectedGroups


class BackgroundSampling:
    """The sampling of at most one step, which is under way on a thread, or is finished and was not taken yet."""

    def __init__(self) -> None:
        self.step = 0
        """The step whose sampling was begun last; 0 before the first."""
        self.sampled: Future[CollectedGroups] = Future()
        self.sampled.set_result(CollectedGroups([]))

    def begin(self, step: int, sample: Callable[[], CollectedGroups]) -> None:
        """Calls `sample` on a thread. The sampling before must be finished."""
        self.step, self.sampled = step, Future()
        # The thread is a daemon since a run that is stopped does not wait for it: what it has graded is kept.
        threading.Thread(target=_fulfil, args=(self.sampled, sample), name="sampling", daemon=True).start()

    def take(self) -> CollectedGroups:
        """Waits for the groups of `step` and returns them. Raises what sampling has raised."""
        return self.sampled.result()

    def settle(self) -> None:
        """Waits until the engine is free."""
        self.sampled.exception()


def _fulfil(sampled: Future[CollectedGroups], sample: Callable[[], CollectedGroups]) -> None:
    try:
        sampled.set_result(sample())
    except BaseException as error:  # raised again by `take`
        sampled.set_exception(error)
