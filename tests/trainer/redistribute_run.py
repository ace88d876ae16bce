"""Three ranks with 0, 1 and 8 samples redistribute them; fails if one has changed: to be run on every rank."""

from dataclasses import replace

import torch
from records import rollout
from torch.distributed import ProcessGroup

from lens_megatron.batch import balance, redistribute
from lens_megatron.records import between_ranks
from lens_megatron.reward.types import GradeStatus
from lens_megatron.types import Origin, Rollout, Sample

OWNED = [0, 1, 8]
HIDDEN = 16


def samples() -> list[Sample]:
    made = []
    for i in range(sum(OWNED)):
        origin = Origin.PURIFIED if i % 2 else Origin.NATIVE
        length = 1 + (5 * i) % 7
        kept = Rollout(
            tuple(range(i, i + length)), (-1 / (i + 3),) * length, i % 3 > 0, origin, i, i / 7, GradeStatus.UNPARSED
        )
        prompt = tuple(range(100, 103 + i))
        made.append(Sample(prompt, prompt[:2] if i % 2 else prompt, kept, 1 / (i + 3), i / 11))
    return [*made[:-1], Sample((4, 5), (4, 5), rollout(True), 0.1, 0.2)]


def gathered_and_told(group: ProcessGroup, everything: list[Sample], rank: int, first: int) -> None:
    """A sample of 200 bytes takes one message of a broadcast, one of 5000 tokens two."""
    owned = everything[first : first + OWNED[rank]]
    parts = between_ranks.all_gather(Sample, owned, group)
    assert [len(part) for part in parts] == OWNED and [s for part in parts for s in part] == everything
    uneven = replace(everything[0], rollout=replace(everything[0].rollout, log_probs=(-0.5, float("-inf"))))
    for sample in (uneven, replace(uneven, prompt=tuple(range(5000)))):
        assert between_ranks.broadcast(Sample, None if rank else sample, group) == sample


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, everything = torch.distributed.get_rank(), samples()
    first = sum(OWNED[:rank])
    group = torch.distributed.group.WORLD
    share = redistribute.redistribute(everything[first : first + OWNED[rank]], group, HIDDEN)
    costs = [balance.cost(len(s.prompt) + len(s.rollout.token_ids), HIDDEN) for s in everything]
    shares = balance.assign(costs, len(OWNED))
    assert share.samples == [everything[i] for i in shares[rank]] and len(shares[rank]) >= 2
    assert share.total == len(everything)
    assert share.imbalance == balance.imbalance(costs, shares)
    assert redistribute.redistribute([], group, HIDDEN) == redistribute.Share([], 1.0, 0)
    gathered_and_told(group, everything, rank, first)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
