"""Says how many candidates of a step may be sampled, where `selection.method` rejects some of their groups.

The first B candidates start at once, B = rollout.prompts_per_step, and every rejected group starts the next candidate:

    B = 2     0 passes   1 is rejected -> 2 starts   2 is rejected -> 3 starts   3 passes: the step trains on 0 and 3

The candidates that have started are always the first B + R, R of which were rejected; when all of these are decided,
exactly B have passed, or the candidates ran out. The last of them has passed, since what it would have let start as a
rejected one is not among them; so they end with the B-th candidate that passes, in the order of the candidates,
whatever is sampled first or fastest: nothing is sampled in vain, and no short completion is preferred.
"""

import sys
import time
from typing import Protocol

from lens_megatron.rollout.queue import LOOK_SECONDS
from lens_megatron.supervision.control_store import ControlStore


class Refill(Protocol):
    """The interface to the scheduler of an engine. Candidates are counted over all engines, by their places."""

    def limit(self) -> int:
        """Returns how many candidates may have started by now. It never falls."""

    def decided(self, *, kept: bool) -> None:
        """Notes that a group of this engine is done, and whether it has passed."""

    def is_over(self) -> bool:
        """Returns whether `limit` rises no more unless a group of this engine is rejected."""


class NoRefill:
    """Implements `Refill` for steps that sample all of their candidates at once."""

    def limit(self) -> int:
        return sys.maxsize

    def decided(self, *, kept: bool) -> None:
        pass

    def is_over(self) -> bool:
        return True


class OwnRefill:
    """Implements `Refill` for the only engine of a job.

    Args:
        wanted: the number of groups that are to pass.
    """

    def __init__(self, wanted: int):
        self.open = wanted

    def limit(self) -> int:
        return self.open

    def decided(self, *, kept: bool) -> None:
        self.open += not kept

    def is_over(self) -> bool:
        return True


class SharedRefill:
    """Implements `Refill` for one of several engines, which count together in the job's control store.

    When a candidate starts depends on how fast the other engines are; which candidates start does not.

    Args:
        store: the connection to the store; a store lives no longer than the ranks that opened it, so an interrupted
            attempt at a step leaves no counts behind.
        step: the step that is sampled. Every engine must be done with the step before.
        wanted: the number of groups that are to pass, all engines together.
        candidates: the number of candidates of the step, all engines together.
    """

    def __init__(self, store: ControlStore, step: int, wanted: int, candidates: int):
        self.store, self.wanted, self.candidates = store, wanted, candidates
        self.names = [_key(step, kept=kept) for kept in (False, True)]
        self.rejected, self.kept, self.looked = 0, 0, 0.0
        store.delete([_key(step - 1, kept=kept) for kept in (False, True)])

    def limit(self) -> int:
        self._look()
        return self.wanted + self.rejected

    def decided(self, *, kept: bool) -> None:
        count = self.store.add(self.names[kept], 1)
        if kept:
            self.kept = count
        else:
            self.rejected = count

    def is_over(self) -> bool:
        self._look()
        return self.kept >= self.wanted or self.kept + self.rejected >= self.candidates

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked > LOOK_SECONDS:
            self.looked = now
            self.rejected, self.kept = (int(value or 0) for value in self.store.get(self.names))


def _key(step: int, *, kept: bool) -> str:
    return f"refill/{step}/{'kept' if kept else 'rejected'}"


NO_REFILL = NoRefill()
