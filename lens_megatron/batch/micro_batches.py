"""Cuts this rank's bundles into micro-batches within a budget of tokens, equally many on every data-parallel rank."""

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from lens_megatron.batch import balance
from lens_megatron.batch.bundles import Bundle


def plan_micro_batches(
    bundles: Sequence[Bundle],
    max_tokens: int,
    *,
    multiple_of: int,
    group: ProcessGroup,
    device: torch.device,
) -> list[list[int]]:
    """Returns the indices of the samples of each micro-batch, bundle after bundle; none if no rank has a sample.

    All ranks get equally many micro-batches, because expert-parallel ranks run them together. A collective of `group`.

    Args:
        multiple_of: the number of micro-batches is a multiple of it; interleaved pipelines need that of their stages.
    """
    tokens, costs = [bundle.tokens for bundle in bundles], [bundle.cost for bundle in bundles]
    count = torch.tensor([balance.fewest(tokens, max_tokens)], device=device)
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX, group=group)
    parts = balance.cut(tokens, costs, max_tokens, -(-int(count) // multiple_of) * multiple_of)
    return [[i for number in part for i in bundles[number].members] for part in parts]
