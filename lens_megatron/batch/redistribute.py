"""Moves samples to the data-parallel ranks that train on them: every rank learns all lengths, one gets the sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from lens_megatron.batch import balance, bundles
from lens_megatron.batch.bundles import SampleSize
from lens_megatron.records import between_ranks
from lens_megatron.types import Sample


@dataclass(frozen=True, slots=True)
class Share:
    """The samples that one rank trains on in one optimizer step."""

    samples: list[Sample]
    """The samples stand in the order of the ranks that sampled them, and then in the order of those ranks' lists."""
    imbalance: float
    """Cost of the costliest rank's share / mean."""
    total: int
    """The number of samples of all ranks."""


PIECES_OF_A_SHARE = 4
"""A bundle of samples that share their prompt costs at most one part in this many of a rank's mean share: with larger
ones the shares could not be balanced. A single sample may cost more."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of one rank's samples, which all ranks need to agree on who trains on them."""

    prompts: tuple[int, ...]
    """For every sample the number of the first one of this rank that has the same prompt."""
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]


def redistribute(samples: Sequence[Sample], group: ProcessGroup, hidden_size: int, *, by_prompt: bool = False) -> Share:
    """Returns this rank's share of the samples of all ranks of `group`, each to the bit what it was. A collective.

    Every rank learns the size of every sample; all else goes from the rank that sampled it to its new rank.

    Args:
        by_prompt: samples of a rank with the same prompt go to one rank, or to few, because they share its rows.
    """
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if world == 1:
        return Share(list(samples), 1.0, len(samples))
    of_ranks = [sizes for (sizes,) in between_ranks.all_gather(_Sizes, [_sizes_of(samples)], group)]
    sizes = [
        SampleSize((owner, first), prompt, response)
        for owner, part in enumerate(of_ranks)
        for first, prompt, response in zip(part.prompts, part.prompt_tokens, part.response_tokens, strict=True)
    ]
    together = bundles.single(sizes, hidden_size)
    if by_prompt:
        mean = sum(bundle.cost for bundle in together) / world
        together = bundles.by_prompt(sizes, hidden_size, max_cost=mean / PIECES_OF_A_SHARE)
    costs = [bundle.cost for bundle in together]
    dealt = balance.assign(costs, world)
    shares = [[i for number in share for i in together[number].members] for share in dealt]
    first = sum(len(part.prompts) for part in of_ranks[:rank])
    leaving = [[samples[i - first] for i in share if 0 <= i - first < len(samples)] for share in shares]
    arrived = between_ranks.all_to_all(Sample, leaving, group)
    imbalance = balance.imbalance(costs, dealt)
    return Share([sample for part in arrived for sample in part], imbalance, len(sizes))


def _sizes_of(samples: Sequence[Sample]) -> _Sizes:
    numbers: dict[tuple[int, ...], int] = {}
    return _Sizes(
        tuple(numbers.setdefault(sample.prompt, i) for i, sample in enumerate(samples)),
        tuple(len(sample.prompt) for sample in samples),
        tuple(len(sample.rollout.token_ids) for sample in samples),
    )
