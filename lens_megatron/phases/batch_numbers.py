"""Tells every rank the numbers of the step's groups of all ranks, which some advantages are computed from."""

from collections.abc import Sequence

from lens_megatron.records import between_ranks
from lens_megatron.run import Run
from lens_megatron.types import GroupNumbers, TrainingGroup


def gather(run: Run, groups: Sequence[TrainingGroup]) -> tuple[GroupNumbers, ...]:
    """Returns the numbers of all groups of the step, in the order of their places. A collective."""
    with run.clock("exchange"):
        of_ranks = between_ranks.all_gather(GroupNumbers, list(map(GroupNumbers.of, groups)), run.mesh.dp_group)
    return tuple(sorted((numbers for of_rank in of_ranks for numbers in of_rank), key=lambda numbers: numbers.place))
