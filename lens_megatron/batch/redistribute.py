"""Moves samples to the data-parallel ranks that train on them: every rank learns all lengths, one gets the sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from lens_megatron.batch import balance
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


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The lengths of one rank's samples, which all ranks need to agree on who trains on them."""

    tokens: tuple[int, ...]
    """Tokens of prompt and response of every sample."""


def redistribute(samples: Sequence[Sample], group: ProcessGroup, hidden_size: int) -> Share:
    """Returns this rank's share of the samples of all ranks of `group`, each to the bit what it was. A collective.

    Every rank learns the length of every sample; all else goes from the rank that sampled it to its new rank.
    """
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if world == 1:
        return Share(list(samples), 1.0, len(samples))
    own = _Lengths(tuple(len(sample.prompt) + len(sample.rollout.token_ids) for sample in samples))
    of_ranks = [lengths.tokens for (lengths,) in between_ranks.all_gather(_Lengths, [own], group)]
    lengths = [tokens for of_rank in of_ranks for tokens in of_rank]
    shares = balance.assign(lengths, world, hidden_size)
    first = sum(map(len, of_ranks[:rank]))
    leaving = [[samples[i - first] for i in share if 0 <= i - first < len(samples)] for share in shares]
    arrived = between_ranks.all_to_all(Sample, leaving, group)
    imbalance = balance.imbalance(lengths, shares, hidden_size)
    return Share([sample for part in arrived for sample in part], imbalance, len(lengths))
