"""Methods of selection for tests, as a user would write them, and a grader that kills the trainer in a refill."""

import os
from collections.abc import Callable
from pathlib import Path

from graders import kill_trainer

from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.selection import PromptSource, Selection
from lens_megatron.algorithms.selection._cursor import InOrder
from lens_megatron.types import TrainingGroup


class Picky(InOrder):
    refills = True

    def __init__(self, source: PromptSource, wants: Callable[[TrainingGroup], bool]):
        super().__init__(source)
        self.keep = wants


def method(wants: Callable[[TrainingGroup], bool]) -> Entry:
    def selection(source: PromptSource, seed: int, options: NoOptions) -> Selection:
        return Picky(source, wants)

    return Entry(selection, paper="this test")


HALF = method(lambda group: sum(token for rollout in group.rollouts for token in rollout.token_ids) % 2 == 0)
"""About every second group passes, as its tokens decide."""
ONE_IN_FOUR = method(lambda group: group.group.place % 4 == 2)
NONE = method(lambda group: False)


def murderous_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Kills the trainer in step 2, once five groups are kept on disk, if MURDER holds a file `armed`."""
    folder = Path(os.environ["MURDER"])
    kept = [line for path in folder.glob("run/unfinished/step_000002_*") for line in path.read_text().split("\n")]
    if sum(map(bool, kept)) >= 5 and (folder / "armed").exists():
        kill_trainer(folder, after=1)
    return float(len(solution_str) % 2 == 0)
