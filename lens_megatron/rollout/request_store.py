"""Carries what the ranks of a job tell each other while they sample: batches of requests, and their completions.

Every rank reads and writes the job's control store. The rank that owns a batch posts it, the rank that claims it first
serves it, and its completions go back to the owner. Only bytes travel, and no rank waits for another:

    batches/3 -> requests     claims/3 -> how many have tried     results/0/7 -> the eighth completion sent to rank 0
"""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from lens_megatron.records import codec
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.supervision.control_store import ControlStore


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """Requests that are best served together, since they share a prompt."""

    requests: tuple[Request, ...]
    urgent: bool
    """Urgent batches are started before all others."""
    expected_length: float
    """Batches with longer completions are started first. Any unit will do, the same for all batches."""


@dataclass(frozen=True, slots=True)
class _Withdrawal:
    """Requests that their owner no longer wants."""

    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PhaseTotals:
    """Sums over all ranks, as they were at the last look."""

    unfinished: int
    """The number of requests that were posted and neither completed nor withdrawn."""
    capacity: int
    """The number of sequences that all engines can run at once."""
    engines: int
    """The number of engines that serve, or may again before other weights are loaded."""
    ranks_here: int
    """The number of ranks that have begun this phase."""
    ranks_done: int
    """The number of ranks that wait for nothing more in this phase."""


_TOTALS = tuple(field.name for field in fields(PhaseTotals))


class RequestStore:
    """One rank's connection to what all ranks read and write in a phase.

    A phase is one call of `RolloutScheduler.sample`, or one evaluation. Every rank takes part in every phase.
    """

    def __init__(self, store: ControlStore, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.phase = 0
        self.keys: set[str] = set()
        self.keys_before: set[str] = set()
        """Keys that this rank wrote in the phase before, which another rank may still be leaving."""
        self.counts: dict[str, int] = {}
        """The counters of this phase as last read, by name: lengths of what is appended to, and the totals."""
        self.read: dict[str, int] = {}
        """The number of appended entries that this rank has read, by name."""

    def begin(self, capacity: int, engines: int) -> None:
        """Begins the next phase with an engine of this capacity. `engines` is 0 if it is hopeless, else 1."""
        self.store.delete(self.keys_before)
        self.keys_before, self.keys = self.keys, set()
        self.phase += 1
        self.read = {"batches": 0, f"results/{self.rank}": 0, "withdrawn": 0}
        self.counts = {name: self._add(name, 0) for name in (*self.read, *_TOTALS)}
        self.add_capacity(capacity)
        self.add_engines(engines)
        self._add("ranks_here", 1)

    def add_capacity(self, difference: int) -> None:
        self._add("capacity", difference)

    def add_engines(self, difference: int) -> None:
        self._add("engines", difference)

    def leave(self) -> None:
        """Notes that this rank waits for nothing more in this phase."""
        self._add("ranks_done", 1)

    def look(self) -> PhaseTotals:
        """Reads all counters from the store at once; the methods below return what has come since the look before."""
        values = self.store.get([self._key(name) for name in self.counts])
        self.counts = {name: int(value or 0) for name, value in zip(self.counts, values, strict=True)}
        return PhaseTotals(*(self.counts[name] for name in _TOTALS))

    def post(self, batch: RequestBatch) -> int:
        """Offers a batch to all ranks, and returns its number."""
        self._add("unfinished", len(batch.requests))
        return self.post_again(batch)

    def post_again(self, batch: RequestBatch) -> int:
        """Offers requests again that this rank has claimed and cannot serve; returns the new batch's number."""
        return self._append("batches", _batch_bytes(batch))

    def new_batches(self) -> list[tuple[int, RequestBatch]]:
        """The batches that were posted between the last two looks, this rank's own too, with their numbers."""
        first = self.read["batches"]
        found = self._read_new("batches")
        return [(first + place, _read_batch(data)) for place, data in enumerate(found)]

    def claim(self, number: int) -> bool:
        """Returns True to the first rank that claims the batch, which must serve it, post it again, or finish it."""
        return self._add(f"claims/{number}", 1) == 1

    def finished(self, requests: int) -> None:
        """Notes that this number of requests are completed, or will never be."""
        self._add("unfinished", -requests)

    def send(self, owner: int, completion: Completion) -> None:
        self._append(f"results/{owner}", bytes(codec.encode(Completion, [completion])))

    def received(self) -> list[Completion]:
        """The completions of this rank's requests that other ranks had sent by the last look."""
        name = f"results/{self.rank}"
        first = self.read[name]
        found = [completion for data in self._read_new(name) for completion in codec.decode(Completion, data)]
        if found:
            self.store.delete([self._key(f"{name}/{first + place}") for place in range(len(found))])
        return found

    def withdraw(self, request_ids: Collection[int]) -> None:
        """Asks the ranks that serve these requests to stop. Completions that are under way may still come."""
        self._append("withdrawn", bytes(codec.encode(_Withdrawal, [_Withdrawal(tuple(sorted(request_ids)))])))

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
        keys = [self._key(f"{name}/{number}") for number in range(seen, count)]
        found = [data for data in self.store.get(keys) if data is not None]
        if len(found) < len(keys):
            raise RuntimeError(
                f"the control store has {len(found)} of the {len(keys)} entries {keys[0]} to {keys[-1]}; a rank has "
                "deleted some before this one read them: report this"
            )
        return found


def _batch_bytes(batch: RequestBatch) -> bytes:
    """Writes the prompt only once, with the first of the requests, since they share it."""
    first, *others = batch.requests
    if any(request.prompt != first.prompt for request in others):
        raise ValueError("the requests of a batch share a prompt")
    lean = tuple(replace(request, prompt=()) for request in others)
    return bytes(codec.encode(RequestBatch, [replace(batch, requests=(first, *lean))]))


def _read_batch(data: bytes) -> RequestBatch:
    (batch,) = codec.decode(RequestBatch, data)
    prompt = batch.requests[0].prompt
    return replace(batch, requests=tuple(replace(request, prompt=prompt) for request in batch.requests))
