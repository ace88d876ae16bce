"""Cuts this rank's sequences into micro-batches within a budget of tokens, equally many on every data-parallel rank."""

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from lens_megatron.batch import balance


def plan_micro_batches(
    lengths: Sequence[int],
    max_tokens: int,
    hidden_size: int,
    *,
    multiple_of: int,
    group: ProcessGroup,
    device: torch.device,
) -> list[list[int]]:
    """Returns the indices of the sequences of each micro-batch; there are none if no rank has a sequence.

    All ranks get equally many micro-batches, because expert-parallel ranks run them together. A collective of `group`.

    Args:
        multiple_of: the number of micro-batches is a multiple of it; interleaved pipelines need that of their stages.
    """
    count = torch.tensor([balance.fewest(lengths, max_tokens)], device=device)
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX, group=group)
    return balance.cut(lengths, max_tokens, -(-int(count) // multiple_of) * multiple_of, hidden_size)
