"""Consecutive ranks that hold one engine together: the first decides, the others do the same.

    leader     submit, cancel, step, step, ...   dismiss        (the sampler drives it like any engine)
    followers  follow() ------------------------ returns

vLLM's tensor-parallel ranks each have a scheduler, and stay in step only if all are given the same requests in the same
order between the same steps. When a verdict comes is up to graders, so only one rank may decide; its decisions travel
as tensors. Weights, waking and sleeping are not told: every rank comes to them by itself.
"""

import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lens_megatron.rollout import replay
from lens_megatron.rollout.engine import Completion, EngineProgress, Request, RolloutEngine
from lens_megatron.types import Group, StepPrompt


class EngineGroupError(RuntimeError):
    """The ranks of one engine did not draw the same tokens."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """The ranks of one engine, and where it stands among the engines of the job."""

    rank: int
    """Within the group."""
    size: int
    number: int
    """Of this engine, from 0."""
    engines: int
    group: ProcessGroup | None
    """gloo, so that no GPU waits for a command; None where every rank has an engine of its own."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


def build_engine_group(size: int, timeout_minutes: float = 30) -> EngineGroup:
    """The group of this rank when every `size` consecutive ranks, which divide the world, share an engine.

    A collective over the world. A follower waits for a command as long as `timeout_minutes`.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = None
    if size > 1:
        ranks = [list(range(first, first + size)) for first in range(0, world, size)]
        timeout = timedelta(minutes=timeout_minutes)
        group, _ = torch.distributed.new_subgroups_by_enumeration(ranks, backend="gloo", timeout=timeout)
    return EngineGroup(rank % size, size, rank // size, world // size, group)


@dataclass(frozen=True, slots=True)
class Work:
    """What one engine is to sample: on the leader all that its group was dealt, on followers nothing."""

    prompts: tuple[StepPrompt, ...]
    counts: tuple[int, ...]
    """Prompts that each rank of the group was dealt; the leader's come first."""


def collect(engine_group: EngineGroup, prompts: Sequence[StepPrompt]) -> Work:
    """Brings the ranks' prompts to the leader. A collective of the group."""
    if engine_group.size == 1:
        return Work(tuple(prompts), (len(prompts),))
    parts = replay.exchange([Group(p.prompt, (), p.purified) for p in prompts], engine_group.group)
    own = torch.full((max(map(len, parts)),), -1)
    own[: len(prompts)] = torch.tensor([prompt.place for prompt in prompts], dtype=torch.int64)
    places = [torch.empty_like(own) for _ in parts]
    torch.distributed.all_gather(places, own, group=engine_group.group)
    gathered = [
        StepPrompt(place, group.prompt, group.purified)
        for part, row in zip(parts, places, strict=True)
        for group, place in zip(part, row[: len(part)].tolist(), strict=True)
    ]
    return Work(tuple(gathered) if engine_group.leads else (), tuple(map(len, parts)))


def hand_back(engine_group: EngineGroup, groups: Sequence[Group], work: Work) -> list[Group]:
    """The groups of the prompts that this rank was dealt; `groups` are the leader's. A collective of the group."""
    if engine_group.size == 1:
        return list(groups)
    everything = replay.exchange(groups, engine_group.group)[0]
    first = sum(work.counts[: engine_group.rank])
    return everything[first : first + work.counts[engine_group.rank]]


class _Command(IntEnum):
    DISMISS, SUBMIT, CANCEL, STEP = range(4)


class TensorParallelEngine:
    """Implements `RolloutEngine` on the leader, over each rank's part of the engine. Followers call `follow` instead.

    `load_weights`, `wake`, `sleep` and `close` are called by all ranks of the group.
    """

    def __init__(self, engine: RolloutEngine, engine_group: EngineGroup):
        self.engine, self.engine_group = engine, engine_group
        self.seen = 0
        """Checksum of all completions since the last dismissal."""

    @property
    def version(self) -> int | None:
        return self.engine.version

    @contextmanager
    def phase(self) -> Iterator[None]:
        self.follow()
        yield
        self.dismiss()

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self._tell(_Command.SUBMIT, pack_requests(requests))
        self.engine.submit(requests)

    def step(self) -> list[Completion]:
        self._tell(_Command.STEP)
        return self._stepped()

    def cancel(self, request_ids: Collection[int]) -> int:
        numbers = sorted(request_ids)
        self._tell(_Command.CANCEL, torch.tensor(numbers, dtype=torch.int64))
        return self.engine.cancel(numbers)

    def follow(self) -> None:
        """A follower's part of a phase: does what the leader does, until it is dismissed. At once for the leader."""
        while not self.engine_group.leads:
            command, payload = self._hear()
            if command is _Command.SUBMIT:
                self.engine.submit(unpack_requests(payload))
            elif command is _Command.CANCEL:
                self.engine.cancel(payload.tolist())
            elif command is _Command.STEP:
                self._stepped()
            else:
                return self._compare()

    def dismiss(self) -> None:
        """The leader's end of a phase. Nothing for followers. Raises EngineGroupError, like `follow`."""
        if self.engine_group.leads:
            self._tell(_Command.DISMISS)
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

    def _stepped(self) -> list[Completion]:
        completions = self.engine.step()
        for completion in completions:
            numbers = (completion.request_id, completion.finished, *completion.token_ids)
            self.seen = zlib.crc32(struct.pack(f"{len(numbers)}q", *numbers), self.seen)
        return completions

    def _tell(self, command: _Command, payload: Tensor | None = None) -> None:
        length = 0 if payload is None else len(payload)
        self._broadcast(torch.tensor([command, length], dtype=torch.int64))
        if length:
            self._broadcast(payload)

    def _hear(self) -> tuple[_Command, Tensor]:
        head = torch.empty(2, dtype=torch.int64)
        self._broadcast(head)
        payload = torch.empty(int(head[1]), dtype=torch.int64)
        if len(payload):
            self._broadcast(payload)
        return _Command(int(head[0])), payload

    def _broadcast(self, tensor: Tensor) -> None:
        torch.distributed.broadcast(tensor, group=self.engine_group.group, group_src=0)

    def _compare(self) -> None:
        own, self.seen = torch.tensor([self.seen]), 0
        every = [torch.empty_like(own) for _ in range(self.engine_group.size)]
        torch.distributed.all_gather(every, own, group=self.engine_group.group)
        if len({int(seen) for seen in every}) > 1:
            size, number = self.engine_group.size, self.engine_group.number
            raise EngineGroupError(
                f"the {size} ranks of engine {number} drew different tokens in this phase, so its log-probabilities "
                "are of no policy; train with vllm.tensor_parallel_size=1 and report this"
            )


def pack_requests(requests: Iterable[Request]) -> Tensor:
    """[n] int64: of each its id, max_new_tokens, seed, temperature (bits of a double), tokens of the prompt, prompt."""
    numbers: list[int] = []
    for request in requests:
        (bits,) = struct.unpack("q", struct.pack("d", request.temperature))
        numbers += [request.request_id, request.max_new_tokens, request.seed, bits, len(request.prompt)]
        numbers += request.prompt
    return torch.tensor(numbers, dtype=torch.int64)


def unpack_requests(packed: Tensor) -> list[Request]:
    numbers, requests, place = packed.tolist(), [], 0
    while place < len(numbers):
        number, new_tokens, seed, bits, length = numbers[place : place + 5]
        prompt = tuple(numbers[place + 5 : place + 5 + length])
        (temperature,) = struct.unpack("d", struct.pack("q", bits))
        requests.append(Request(number, prompt, new_tokens, temperature, seed))
        place += 5 + length
    return requests
