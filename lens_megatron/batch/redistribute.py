"""Moves samples to the data-parallel ranks that train on them: lengths to everyone, contents as tensors to one rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from lens_megatron.batch import balance
from lens_megatron.reward.types import GradeStatus
from lens_megatron.types import Origin, Rollout, Sample

ORIGINS, STATUSES = list(Origin), list(GradeStatus)
INTEGERS, NUMBERS = 4, 3
"""What a sample has of each beside what grows with its tokens; see `_integers` and `_numbers`."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank trains on in one optimizer step."""

    samples: list[Sample]
    """In the order of their first owners' ranks, and then of their lists."""
    imbalance: float
    """Cost of the costliest rank's share / mean."""


def redistribute(samples: Sequence[Sample], group: ProcessGroup, hidden_size: int, device: torch.device) -> Share:
    """This rank's share of the samples of all ranks of `group`, each to the bit what it was. A collective.

    Everyone learns three lengths per sample; everything else goes from its owner to its new rank and nowhere else.
    """
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if world == 1:
        return Share(list(samples), 1.0)
    tables = _gather_lengths(samples, group, device)
    lengths = torch.cat(tables).tolist()
    whole = [prompt + response for prompt, _, response in lengths]
    shares = balance.assign(whole, world, hidden_size)
    first = sum(len(table) for table in tables[:rank])
    leaving = [[samples[i - first] for i in share if 0 <= i - first < len(samples)] for share in shares]
    integers = _all_to_all([[x for s in part for x in _integers(s)] for part in leaving], torch.int64, group, device)
    numbers = _all_to_all([[x for s in part for x in _numbers(s)] for part in leaving], torch.float64, group, device)
    arrived = _read([lengths[i] for i in shares[rank]], integers, numbers)
    return Share(arrived, balance.imbalance(whole, shares, hidden_size))


def _gather_lengths(samples: Sequence[Sample], group: ProcessGroup, device: torch.device) -> list[Tensor]:
    """Of each rank of `group`, [samples, 3] int64 on the CPU: tokens of prompt, of generation prompt, of response."""
    world = torch.distributed.get_world_size(group)
    rows = [(len(s.prompt), len(s.generation_prompt), len(s.rollout.token_ids)) for s in samples]
    own = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3)
    counts = torch.empty(world, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=device), group=group)
    longest = int(counts.max())
    table = torch.empty(world * longest, 3, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(table, pad(own, (0, 0, 0, longest - len(rows))), group=group)
    return [part[:count] for part, count in zip(table.cpu().view(world, longest, 3), counts.tolist(), strict=True)]


def _all_to_all(parts: Sequence[list], dtype: torch.dtype, group: ProcessGroup, device: torch.device) -> list:
    """Sends `parts[r]` to rank r; returns what came, from rank 0 first."""
    sending = torch.tensor([len(part) for part in parts], device=device)
    coming = torch.empty_like(sending)
    torch.distributed.all_to_all_single(coming, sending, group=group)
    sent = torch.tensor([value for part in parts for value in part], dtype=dtype, device=device)
    received = torch.empty(int(coming.sum()), dtype=dtype, device=device)
    torch.distributed.all_to_all_single(received, sent, coming.tolist(), sending.tolist(), group=group)
    return received.tolist()


def _integers(sample: Sample) -> list[int]:
    rollout = sample.rollout
    origin, status = ORIGINS.index(rollout.origin), STATUSES.index(rollout.status)
    rest = [int(rollout.finished), origin, status, rollout.weight_version]
    return [*sample.prompt, *sample.generation_prompt, *rollout.token_ids, *rest]


def _numbers(sample: Sample) -> list[float]:
    """Python's floats are float64: nothing is rounded. Raises ValueError where they would be read wrong."""
    rollout = sample.rollout
    if len(rollout.log_probs) != len(rollout.token_ids):
        raise ValueError(f"rollout: got {len(rollout.log_probs)} log_probs for {len(rollout.token_ids)} token_ids")
    return [*rollout.log_probs, rollout.reward, sample.advantage, sample.weight]


def _read(lengths: Sequence[Sequence[int]], integers: list[int], numbers: list[float]) -> list[Sample]:
    """Undoes `_integers` and `_numbers` of samples of these (prompt, generation prompt, response) lengths."""
    samples, i, n = [], 0, 0
    for prompt, generation, response in lengths:
        start, middle, stop = i + prompt, i + prompt + generation, i + prompt + generation + response
        finished, origin, status, version = integers[stop : stop + INTEGERS]
        reward, advantage, weight = numbers[n + response : n + response + NUMBERS]
        rollout = Rollout(
            token_ids=tuple(integers[middle:stop]),
            log_probs=tuple(numbers[n : n + response]),
            finished=bool(finished),
            origin=ORIGINS[origin],
            weight_version=version,
            reward=reward,
            status=STATUSES[status],
        )
        samples.append(Sample(tuple(integers[i:start]), tuple(integers[start:middle]), rollout, advantage, weight))
        i, n = stop + INTEGERS, n + response + NUMBERS
    return samples
