"""Takes the prompts as they come, and trains on every group."""

from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.selection import PromptSource
from lens_megatron.algorithms.selection._cursor import InOrder
from lens_megatron.types import TrainingGroup


class EveryPrompt(InOrder):
    """Goes through the data, epoch after epoch, and rejects nothing."""

    refills = False

    def keep(self, group: TrainingGroup) -> bool:
        return True


def every_prompt(source: PromptSource, seed: int, options: NoOptions) -> EveryPrompt:
    """Returns the selection of a run that leaves nothing out."""
    return EveryPrompt(source)


ENTRY = Entry(every_prompt, paper="this project")
