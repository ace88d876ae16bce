"""Describes one rank's part of a vocabulary that a process group divides among its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lens_kernels._checks import require


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the vocabulary: plain integers, so that no function waits for an accelerator to know them.

    Build it once, where the model is built, with `even` or `gather`, and pass it to every call. Ranks hold consecutive
    parts in rank order; parts may differ in size. Raises ValueError for columns that no vocabulary can have.
    """

    start: int
    """The global id of local column 0."""
    size: int
    """Local columns, padding included."""
    total: int
    """Size of the whole vocabulary without padding: the columns of global ids from here on are padding."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the vocabulary; None: this rank has all of it."""

    def __post_init__(self) -> None:
        require(self.start >= 0, "VocabShard.start", self.start, "an integer >= 0")
        require(self.size >= 1, "VocabShard.size", self.size, "an integer >= 1")
        require(self.total >= 1, "VocabShard.total", self.total, "an integer >= 1")
        alone = self.group is not None or (self.start == 0 and self.total <= self.size)
        need = "a group, or start 0 and a total of at most the columns that there are"
        require(alone, "VocabShard", f"start {self.start}, size {self.size}, total {self.total} without a group", need)

    @property
    def valid(self) -> int:
        """The number of local columns that are not padding; the others follow them."""
        return min(max(self.total - self.start, 0), self.size)

    @classmethod
    def even(cls, size: int, group: dist.ProcessGroup | None, total: int | None = None) -> VocabShard:
        """Returns the shard of this rank where every rank has `size` columns, as in Megatron. No communication."""
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        return cls(rank * size, size, ranks * size if total is None else total, group)

    @classmethod
    def gather(
        cls, size: int, group: dist.ProcessGroup, total: int | None = None, device: torch.device | str = "cpu"
    ) -> VocabShard:
        """Returns the shard of this rank where ranks have different numbers of columns.

        A collective of 8 bytes per rank, which waits for the host. `device` is one that the group can gather from:
        NCCL needs a CUDA device.
        """
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(sizes, torch.tensor([size], dtype=torch.int64, device=device), group=group)
        counts = sizes.tolist()
        return cls(sum(counts[: dist.get_rank(group)]), size, sum(counts) if total is None else total, group)
