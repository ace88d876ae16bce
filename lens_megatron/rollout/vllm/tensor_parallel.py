"""Lets consecutive ranks hold one engine together: the first rank leads, and the others follow its commands.

    leader     submit, cancel, step, step, ...   dismiss        (the scheduler drives it like any engine)
    followers  follow() ------------------------ returns

Each of vLLM's tensor-parallel ranks has a scheduler. They agree only if all are given the same requests, in the same
order, between the same steps. When a grade comes depends on time, so the leader alone decides, and broadcasts what it
does. It does not broadcast loading of weights, waking and sleeping, since every rank calls these at the same place.
"""

import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lens_megatron.records import between_ranks
from lens_megatron.rollout.engine import Completion, EngineProgress, Request, RolloutEngine
from lens_megatron.types import Group, StepPrompt


class EngineGroupError(RuntimeError):
    """The ranks of one engine did not draw the same tokens."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """The ranks that hold one engine, and the engine's number among those of the job."""

    rank: int
    """This rank's number within the group."""
    size: int
    """The number of ranks that hold the engine."""
    number: int
    """The engine's number, from 0."""
    engines: int
    """The number of engines of the job."""
    group: ProcessGroup | None
    """A group of gloo, so that no GPU waits for a command. None where every rank has an engine of its own."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


def build_engine_group(size: int, timeout_minutes: float = 30) -> EngineGroup:
    """Builds this rank's group where every `size` consecutive ranks hold one engine. A collective of all ranks.

    Args:
        size: a divisor of the number of ranks.
        timeout_minutes: how long a follower waits for a command.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = None
    if size > 1:
        ranks = [list(range(first, first + size)) for first in range(0, world, size)]
        timeout = timedelta(minutes=timeout_minutes)
        group, _ = torch.distributed.new_subgroups_by_enumeration(ranks, backend="gloo", timeout=timeout)
    return EngineGroup(rank % size, size, rank // size, world // size, group)


@dataclass(frozen=True, slots=True)
class EnginePrompts:
    """What one engine must sample: on the leader the prompts of all ranks of its group, on followers none."""

    prompts: tuple[StepPrompt, ...]
    counts: tuple[int, ...]
    """The number of prompts of each rank, the leader's first; empty on followers."""


def gather_to_leader(engine_group: EngineGroup, prompts: Sequence[StepPrompt]) -> EnginePrompts:
    """Brings the prompts of all ranks of the engine to its leader. A collective of the group."""
    own = EnginePrompts(tuple(prompts), (len(prompts),))
    if engine_group.group is None:
        return own
    nothing: list[list[EnginePrompts]] = [[] for _ in range(engine_group.size - 1)]
    sent = between_ranks.all_to_all(EnginePrompts, [[own], *nothing], engine_group.group)
    parts = [part for of_rank in sent for part in of_rank]
    return EnginePrompts(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        counts=tuple(count for part in parts for count in part.counts),
    )


def scatter_from_leader(
    engine_group: EngineGroup, groups: Sequence[Group], engine_prompts: EnginePrompts
) -> list[Group]:
    """Returns the groups of the prompts that this rank gave to `gather_to_leader`. A collective of the group.

    Args:
        groups: on the leader those of `engine_prompts` that were sampled; on followers none.
    """
    if engine_group.group is None:
        return list(groups)
    starts = [0, *accumulate(engine_prompts.counts)]
    places = [{prompt.place for prompt in engine_prompts.prompts[start:end]} for start, end in pairwise(starts)]
    parts = [[group for group in groups if group.place in own] for own in places]
    nothing: list[list[Group]] = [[] for _ in range(engine_group.size - len(parts))]
    leaders, *_ = between_ranks.all_to_all(Group, [*parts, *nothing], engine_group.group)
    return leaders


class Verb(StrEnum):
    """The actions that a leader can tell its followers to do."""

    SUBMIT = "submit"
    CANCEL = "cancel"
    STEP = "step"
    DISMISS = "dismiss"


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a leader to its followers."""

    verb: Verb
    requests: tuple[Request, ...] = ()
    """The requests to submit."""
    request_ids: tuple[int, ...] = ()
    """The ids of the requests to cancel, ascending."""


class TensorParallelEngine:
    """Implements `RolloutEngine` on the leader, over each rank's part of the engine. Followers call `follow` instead.

    All ranks of the group call `load_weights`, `wake`, `sleep` and `close`.
    """

    def __init__(self, engine: RolloutEngine, engine_group: EngineGroup):
        if engine_group.group is None:
            raise ValueError("a tensor-parallel engine needs a group of ranks; got an engine group of one rank")
        self.engine, self.engine_group, self.group = engine, engine_group, engine_group.group
        self.seen = 0
        """The checksum of all completions since the last dismissal."""

    @property
    def version(self) -> int | None:
        return self.engine.version

    @contextmanager
    def phase(self) -> Iterator[None]:
        self.follow()
        yield
        self.dismiss()

    def submit(self, requests: Iterable[Request]) -> None:
        requests = tuple(requests)
        self._tell(Command(Verb.SUBMIT, requests=requests))
        self.engine.submit(requests)

    def step(self) -> list[Completion]:
        self._tell(Command(Verb.STEP))
        return self._step()

    def cancel(self, request_ids: Collection[int]) -> int:
        numbers = tuple(sorted(request_ids))
        self._tell(Command(Verb.CANCEL, request_ids=numbers))
        return self.engine.cancel(numbers)

    def follow(self) -> None:
        """Does on a follower what the leader does, until the leader dismisses it. Returns at once on the leader.

        Raises EngineGroupError where the ranks drew different tokens.
        """
        while not self.engine_group.leads:
            command = self._hear()
            match command.verb:
                case Verb.SUBMIT:
                    self.engine.submit(command.requests)
                case Verb.CANCEL:
                    self.engine.cancel(command.request_ids)
                case Verb.STEP:
                    self._step()
                case Verb.DISMISS:
                    return self._compare()

    def dismiss(self) -> None:
        """Ends a phase on the leader. Does nothing on followers. Raises EngineGroupError, like `follow`."""
        if self.engine_group.leads:
            self._tell(Command(Verb.DISMISS))
            self._compare()

    def capacity(self) -> int:
        return self.engine.capacity()

    def hopeless(self) -> bool:
        return self.engine.hopeless()

    def returned(self) -> list[Request]:
        return self.engine.returned()

    def progress(self) -> EngineProgress:
        return self.engine.progress()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.load_weights(weights, version)

    def wake(self) -> None:
        self.engine.wake()

    def sleep(self) -> None:
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()

    def _step(self) -> list[Completion]:
        completions = self.engine.step()
        for completion in completions:
            numbers = (completion.request_id, completion.finished, *completion.token_ids)
            self.seen = zlib.crc32(struct.pack(f"{len(numbers)}q", *numbers), self.seen)
        return completions

    def _tell(self, command: Command) -> None:
        between_ranks.broadcast(Command, command, self.group)

    def _hear(self) -> Command:
        return between_ranks.broadcast(Command, None, self.group)

    def _compare(self) -> None:
        own, self.seen = torch.tensor([self.seen]), 0
        every = [torch.empty_like(own) for _ in range(self.engine_group.size)]
        torch.distributed.all_gather(every, own, group=self.group)
        if len({int(seen) for seen in every}) > 1:
            size, number = self.engine_group.size, self.engine_group.number
            raise EngineGroupError(
                f"the {size} ranks of engine {number} drew different tokens in this phase, so its log-probabilities "
                "are of no policy; train with vllm.tensor_parallel_size=1 and report this"
            )
