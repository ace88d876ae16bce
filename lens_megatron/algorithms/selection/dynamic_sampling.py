"""Takes the prompts as they come, and trains on no group whose rollouts are all correct or all wrong."""

from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.selection import PromptSource
from lens_megatron.algorithms.selection._cursor import InOrder, has_signal
from lens_megatron.types import TrainingGroup


class DynamicSampling(InOrder):
    """Goes through the data, epoch after epoch, and rejects groups without a signal."""

    refills = True

    def keep(self, group: TrainingGroup) -> bool:
        return has_signal(group)


def dynamic_sampling(source: PromptSource, seed: int, options: NoOptions) -> DynamicSampling:
    """Returns DAPO's dynamic sampling (arXiv 2503.14476, section 3.2).

    A group all of whose rollouts are correct, or none, has no advantages and so no gradient. Another prompt is sampled
    in its place, until the step has all its groups. With purification the group counts as it is trained on, after the
    second wave was merged into it. DAPO samples batches of prompts and throws the surplus away; here as many prompts
    are added as groups were rejected, so nothing is thrown away, and the prompts after the last one that was sampled
    begin the next step.
    """
    return DynamicSampling(source)


ENTRY = Entry(dynamic_sampling, paper="DAPO, Yu et al. 2025, arXiv 2503.14476")
