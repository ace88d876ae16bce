'''Changes the rewards of training rollouts: one file per rule, which `reward.rules` names, in order.

Rules act on every graded rollout of both waves before it is decided which prompts are hard; `reward.success_threshold`
acts after them. Evaluations never see them. A rule of your own stands in any module on PYTHONPATH, is named by
`reward.rules={my_rules:BREVITY: {limit: 100}}`, and needs no more than this:

    class BrevityOptions(Section):
        """The options of `brevity`."""

        limit: int = 200
        """Tokens, above which nothing is paid."""

    def brevity(grade: Grade, facts: RolloutFacts, options: BrevityOptions) -> Grade:
        return grade.with_score(grade.score if facts.tokens <= options.limit else 0.0)

    BREVITY = Entry(brevity, paper="mine", options=BrevityOptions)

It is a pure function. One that needs chance draws from `random.Random(derive(facts.rollout_seed, "brevity"))`, or from
`facts.group_seed` for a draw that all rollouts of a prompt share. `reward.rows.decode(facts.prompt.record)` gives the
row of the dataset with all of its columns.
'''

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lens_megatron.reward.types import Grade
from lens_megatron.types import Origin, Prompt

__all__ = ["RewardRule", "RolloutFacts"]


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """What a rule may know of a rollout besides its grade."""

    prompt: Prompt
    """The prompt of the dataset, whose `record` is the whole row if `reward.rules` is not empty."""
    completion: str
    """The text, without special tokens."""
    tokens: int
    """The length of the completion in tokens."""
    finished: bool
    """False if the completion reached `rollout.max_response_length`."""
    origin: Origin
    step: int
    """The step of training, counted from 1."""
    max_response_length: int
    group_seed: int
    """A random number that all rollouts of a prompt in a step share, both waves."""
    rollout_seed: int
    """A random number of this rollout."""


RewardRule = Callable[[Grade, RolloutFacts, Any], Grade]
"""A pure function of (grade, facts, own options). It changes the score, the status, or both; the score is finite."""
