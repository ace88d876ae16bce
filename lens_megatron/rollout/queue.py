"""Queues requests for engines: for this rank's engine alone, or for all engines of the job through one queue.

`OwnQueue` keeps the requests that wait and gives its engine no more than it can run at once, so that urgent requests
overtake the others. `SharedQueue` puts every batch into the request store. Engines take from it while they have room
and run less than their share of all that is unfinished: engines with little left take over from those with much, and a
second wave starts wherever there is room. Which engine serves a request depends on timing; what it draws, up to
rounding, on weights, prompt and seed only.
"""

import heapq
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from lens_megatron.rollout.engine import Completion, EnginesLostError, Request, RolloutEngine
from lens_megatron.rollout.request_store import RequestBatch, RequestStore

LOOK_SECONDS = 0.02
"""The seconds between two looks at the request store; a step of an engine takes about as long."""

Timed = Callable[[], AbstractContextManager]


class RequestQueue(Protocol):
    """The interface of a queue to the scheduler and evaluations.

    Request ids are unique among all queues of the job: this one's are `first_id`, `first_id + id_step`, and so on.
    """

    first_id: int
    id_step: int

    def add(self, requests: Sequence[Request], *, urgent: bool, expected_length: float) -> None:
        """Queues requests that share a prompt."""

    def step(self) -> list[Completion]:
        """Gives the engine the requests it has room for, lets it take a step, and returns what has ended.

        Where there is nothing to do it waits a moment, so that it may be called until something is added.

        Raises EnginesLostError when no engine is left to serve them.
        """

    def cancel(self, request_ids: Collection[int]) -> None:
        """Forgets requests; `step` never returns their completions."""

    def room(self) -> int:
        """The number of sequences that this rank's engine could run besides those that it runs and those that wait."""

    @property
    def waiting(self) -> int:
        """The number of requests that no engine has yet, as far as this rank knows."""

    @property
    def discarded_tokens(self) -> int:
        """The number of tokens that this rank's engine generated for requests before they were cancelled."""

    def finish(self) -> None:
        """Must be called once nothing more is needed. It serves the other ranks until they need nothing either."""


class OwnQueue:
    """Implements `RequestQueue` for one engine that serves this rank alone. It is deterministic if the engine is."""

    first_id, id_step = 0, 1

    def __init__(self, engine: RolloutEngine, timed: Timed = nullcontext):
        self.engine, self.timed = engine, timed
        self.heap: list[tuple[bool, float, int, Request]] = []
        """Requests that wait: urgent ones first, then those expected to be longest, then in the order of their ids."""
        self.running: dict[int, tuple[bool, float, Request]] = {}
        """Requests in the engine, by id, with the keys that they would be queued by again."""
        self.discarded_tokens = 0

    @property
    def waiting(self) -> int:
        return len(self.heap)

    def requests(self) -> set[int]:
        """The ids of the requests that wait or run."""
        return {*self.running, *(number for _, _, number, _ in self.heap)}

    def add(self, requests: Sequence[Request], *, urgent: bool, expected_length: float) -> None:
        for request in requests:
            heapq.heappush(self.heap, (not urgent, -expected_length, request.request_id, request))

    def room(self) -> int:
        return self.engine.capacity() - len(self.running) - len(self.heap)

    def step(self) -> list[Completion]:
        if not self.running and not self.heap:
            time.sleep(LOOK_SECONDS / 4)
            return []
        if not self.running and not self.engine.capacity():
            self._feed(len(self.heap))  # the engine, which serves nothing, can say why
        completions = self.serve()
        if not self.running and not self.engine.capacity() and self.heap:
            raise EnginesLostError(f"no engine is left for {len(self.heap)} requests")
        return completions

    def serve(self) -> list[Completion]:
        """Does what `step` does, but does not mind that the engine serves nothing now."""
        self._feed(self.engine.capacity())
        if not self.running:
            return []
        with self.timed():
            completions = self.engine.step()
        for completion in completions:
            del self.running[completion.request_id]
        for request in self.engine.returned():
            late, length, _ = self.running.pop(request.request_id)
            heapq.heappush(self.heap, (late, length, request.request_id, request))
        return completions

    def _feed(self, places: int) -> None:
        requests: list[Request] = []
        while self.heap and len(self.running) < places:
            late, length, number, request = heapq.heappop(self.heap)
            self.running[number] = (late, length, request)
            requests.append(request)
        if requests:
            self.engine.submit(requests)

    def cancel(self, request_ids: Collection[int]) -> None:
        gone = set(request_ids)
        self.heap = [entry for entry in self.heap if entry[2] not in gone]
        heapq.heapify(self.heap)
        in_engine = gone & self.running.keys()
        for number in in_engine:
            del self.running[number]
        if in_engine:
            self.discarded_tokens += self.engine.cancel(in_engine)

    def finish(self) -> None:
        pass


class SharedQueue:
    """Implements `RequestQueue` for the engines of all ranks together. Every rank makes a new one for every phase.

    This rank's engine is fed by an `OwnQueue` of what it has claimed, its own requests and others'.
    """

    def __init__(self, engine: RolloutEngine, request_store: RequestStore, timed: Timed = nullcontext):
        self.engine, self.request_store = engine, request_store
        self.claimed = OwnQueue(engine, timed)
        self.first_id, self.id_step = request_store.rank, request_store.world_size
        self.capacity, self.engines = engine.capacity(), int(not engine.hopeless())
        self.open: list[tuple[bool, bool, float, int, RequestBatch]] = []
        """A heap of batches that perhaps nobody has claimed: urgent, then own, then those expected to be longest."""
        self.own: set[int] = set()
        """The ids of requests that were added here and whose completions were not returned yet."""
        self.withdrawn: set[int] = set()
        self.looked = 0.0
        request_store.begin(self.capacity, self.engines)

    @property
    def waiting(self) -> int:
        return self.claimed.waiting + sum(len(batch.requests) for *_, batch in self.open)

    @property
    def discarded_tokens(self) -> int:
        return self.claimed.discarded_tokens

    def room(self) -> int:
        return self.engine.capacity() - len(self.claimed.running) - self.waiting

    def add(self, requests: Sequence[Request], *, urgent: bool, expected_length: float) -> None:
        self.own |= {request.request_id for request in requests}
        self.request_store.post(RequestBatch(tuple(requests), urgent, expected_length))
        self.looked = 0.0

    def step(self) -> list[Completion]:
        received = self._look() if time.monotonic() - self.looked > LOOK_SECONDS else []
        completions = self.claimed.serve()
        self._hand_back()
        if completions:
            self.request_store.finished(len(completions))
        for completion in completions:
            owner = completion.request_id % self.request_store.world_size
            if owner != self.request_store.rank:
                self.request_store.send(owner, completion)
        if not self.claimed.running and not received:
            time.sleep(LOOK_SECONDS / 4)
        ended = [c for c in (*completions, *received) if c.request_id in self.own]
        self.own -= {completion.request_id for completion in ended}
        return ended

    def _look(self) -> list[Completion]:
        """Reads the store, claims what this engine should do next, and returns completions from other engines."""
        self.looked = time.monotonic()
        capacity = self.engine.capacity()
        if capacity != self.capacity:
            self.request_store.add_capacity(capacity - self.capacity)
            self.capacity = capacity
        engines = int(not self.engine.hopeless())
        if engines != self.engines:
            self.request_store.add_engines(engines - self.engines)
            self.engines = engines
        totals = self.request_store.look()
        self._stop_withdrawn()
        if totals.engines == 0 and totals.unfinished and totals.ranks_here == self.request_store.world_size:
            raise EnginesLostError(f"no engine of any rank is left for {totals.unfinished} requests")
        for number, batch in self.request_store.new_batches():
            foreign = batch.requests[0].request_id % self.request_store.world_size != self.request_store.rank
            heapq.heappush(self.open, (not batch.urgent, foreign, -batch.expected_length, number, batch))
        share = -(-totals.unfinished * capacity // max(totals.capacity, 1))
        while self.open and len(self.claimed.running) + self.claimed.waiting < min(share, capacity):
            *_, number, batch = heapq.heappop(self.open)
            if self.request_store.claim(number):
                self.claimed.add(batch.requests, urgent=batch.urgent, expected_length=batch.expected_length)
                self._drop(self.withdrawn & {request.request_id for request in batch.requests})
        return self.request_store.received()

    def _stop_withdrawn(self) -> None:
        """Cancels withdrawn requests that this rank has claimed. Whoever claims the others later drops them then."""
        new = self.request_store.newly_withdrawn()
        self.withdrawn |= new
        self._drop(new & self.claimed.requests())

    def _drop(self, claimed: set[int]) -> None:
        if claimed:
            self.claimed.cancel(claimed)
            self.request_store.finished(len(claimed))

    def _hand_back(self) -> None:
        """Offers the requests that it has claimed to the other engines if this engine serves nothing now."""
        if self.engine.capacity():
            return
        for late, length, _, request in self.claimed.heap:
            self.request_store.post_again(RequestBatch((request,), not late, -length))
        self.claimed.heap.clear()

    def cancel(self, request_ids: Collection[int]) -> None:
        gone = self.own & set(request_ids)
        self.own -= gone
        self.request_store.withdraw(gone)
        self.looked = 0.0

    def finish(self) -> None:
        self.request_store.leave()
        while self.request_store.look().ranks_done < self.request_store.world_size:
            self.step()
        self.claimed.cancel(self.claimed.requests())  # their owners have withdrawn them


def open_queue(engine: RolloutEngine, request_store: RequestStore | None, timed: Timed = nullcontext) -> RequestQueue:
    """Opens the queue of a phase of sampling: for this rank's engine alone, or, given a store, for those of all ranks.

    With a store every rank must open one. `timed` is entered around every step of the engine.
    """
    return SharedQueue(engine, request_store, timed) if request_store else OwnQueue(engine, timed)
