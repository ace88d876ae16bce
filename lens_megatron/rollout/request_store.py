"""What the ranks of a job tell each other while they sample: batches of requests that anyone may take, completions.

Every rank reads and writes the job's control store. A batch is posted once by its owner and belongs to the
rank that claims it first; its completions go back to the owner. Only bytes travel, and no rank waits for another:

    batches/3 -> requests     claims/3 -> how many have tried     results/0/7 -> the eighth completion sent to rank 0
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from lens_megatron.records import codec
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.supervision.control_store import ControlStore


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """Requests that are best served together, since they share a prompt."""

    requests: tuple[Request, ...]
    urgent: bool
    """To be started before all that is not."""
    expected_length: float
    """The longer are started first. In any unit."""


@dataclass(frozen=True, slots=True)
class _Withdrawal:
    """Requests that their owner no longer wants."""

    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all ranks, as last heard of."""

    unfinished: int
    """Requests posted and neither completed nor taken back."""
    capacity: int
    """Sequences that all engines can run at once."""
    engines: int
    """Those that serve, or may again before other weights are loaded."""
    ranks_here: int
    """Those that have come to this phase."""
    ranks_done: int
    """Those that need nothing more of it."""


TOTALS = ("unfinished", "capacity", "engines", "ranks_here", "ranks_done")


class RequestStore:
    """One rank's view; a phase is a call of `RolloutScheduler.sample` or an evaluation; every rank takes part."""

    def __init__(self, store: ControlStore, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.phase = 0
        self.keys: set[str] = set()
        self.keys_before: set[str] = set()
        """Touched by this rank in the phase before, which another may still be leaving."""
        self.counts: dict[str, int] = {}
        """Of this phase, as last read: what has been appended, and the totals."""
        self.read: dict[str, int] = {}
        """How far this rank has read what is appended."""

    def begin(self, capacity: int, engines: int) -> None:
        """Enters the next phase with an engine of this capacity; engines: 0 if it is hopeless, else 1."""
        self.store.delete(self.keys_before)
        self.keys_before, self.keys = self.keys, set()
        self.phase += 1
        self.read = {"batches": 0, f"results/{self.rank}": 0, "withdrawn": 0}
        self.counts = {name: self._add(name, 0) for name in (*self.read, *TOTALS)}
        self.add_capacity(capacity)
        self.add_engines(engines)
        self._add("ranks_here", 1)

    def add_capacity(self, difference: int) -> None:
        self._add("capacity", difference)

    def add_engines(self, difference: int) -> None:
        self._add("engines", difference)

    def leave(self) -> None:
        """Says that this rank waits for nothing more."""
        self._add("ranks_done", 1)

    def look(self) -> Totals:
        """Reads all counters, in one question to the store; what is new is told by the methods below."""
        values = self.store.get([self._key(name) for name in self.counts])
        self.counts = {name: int(value) for name, value in zip(self.counts, values, strict=True)}
        return Totals(*(self.counts[name] for name in TOTALS))

    def post(self, batch: RequestBatch) -> int:
        """Returns its number. Requests given back after a claim are posted again with `post_again`."""
        self._add("unfinished", len(batch.requests))
        return self.post_again(batch)

    def post_again(self, batch: RequestBatch) -> int:
        return self._append("batches", _batch_bytes(batch))

    def new_batches(self) -> list[tuple[int, RequestBatch]]:
        """Those posted between the last two looks, this rank's too, with their numbers."""
        first = self.read["batches"]
        found = self._read_new("batches")
        return [(first + place, _read_batch(data)) for place, data in enumerate(found)]

    def claim(self, number: int) -> bool:
        """True for the first rank that asks, which must then serve it, post it again, or be done with it."""
        return self._add(f"claims/{number}", 1) == 1

    def finished(self, requests: int) -> None:
        """That many of the unfinished ones are completed, or will never be."""
        self._add("unfinished", -requests)

    def send(self, owner: int, completion: Completion) -> None:
        self._append(f"results/{owner}", codec.encode(Completion, [completion]))

    def received(self) -> list[Completion]:
        """Of this rank's requests, what other engines have completed, at the last look."""
        name = f"results/{self.rank}"
        first = self.read[name]
        found = [completion for data in self._read_new(name) for completion in codec.decode(Completion, data)]
        if found:
            self.store.delete([self._key(f"{name}/{first + place}") for place in range(len(found))])
        return found

    def withdraw(self, request_ids: Collection[int]) -> None:
        """Asks whoever serves them to stop. Completions already under way may still come."""
        self._append("withdrawn", codec.encode(_Withdrawal, [_Withdrawal(tuple(sorted(request_ids)))]))

    def newly_withdrawn(self) -> set[int]:
        found = [withdrawal for data in self._read_new("withdrawn") for withdrawal in codec.decode(_Withdrawal, data)]
        return {number for withdrawal in found for number in withdrawal.request_ids}

    def _key(self, name: str) -> str:
        return f"{self.phase}/{name}"

    def _add(self, name: str, amount: int) -> int:
        key = self._key(name)
        self.keys.add(key)
        return self.store.add(key, amount)

    def _append(self, name: str, data: bytes) -> int:
        number = self.store.append(self._key(name), data)
        self.keys.add(self._key(f"{name}/{number}"))
        return number

    def _read_new(self, name: str) -> list[bytes]:
        count, seen = self.counts[name], self.read[name]
        self.read[name] = max(seen, count)
        if count <= seen:
            return []
        return self.store.get([self._key(f"{name}/{number}") for number in range(seen, count)])


def _batch_bytes(batch: RequestBatch) -> bytes:
    """The prompt that the requests share is written once, with the first of them."""
    first, *others = batch.requests
    if any(request.prompt != first.prompt for request in others):
        raise ValueError("the requests of a batch share a prompt")
    lean = tuple(replace(request, prompt=()) for request in others)
    return codec.encode(RequestBatch, [replace(batch, requests=(first, *lean))])


def _read_batch(data: bytes) -> RequestBatch:
    (batch,) = codec.decode(RequestBatch, data)
    prompt = batch.requests[0].prompt
    return replace(batch, requests=tuple(replace(request, prompt=prompt) for request in batch.requests))
